"""One peer's training steps, on request: run by `benchmarks.peers` with the interpreter that has the peer.

It imports nothing of this repository. Its argument is a JSON object (teacher, weights, student, classes, size,
batch, images, threads, system, methods). It builds a step of each method, prints one line, and then answers every
line of its standard input, `{"method": NAME, "steps": N}`, with the seconds and CPU seconds of those steps.

The steps are the peers' own code with the defaults or the sample configuration of their method; images, networks
and the teacher's weights are the same for all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Config = dict[str, Any]
Step = Callable[[Any], None]  # of one batch
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dataset(config: Config) -> Any:
    """The images with the views of the usual ImageNet training."""
    from torchvision import datasets, transforms

    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(config["size"]),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return datasets.ImageFolder(config["images"], view)


def loader(config: Config) -> Any:
    """Batches (images, labels), rendered in this process so that its CPU time counts."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset(config), config["batch"], shuffle=True, drop_last=True)


def networks(config: Config) -> tuple[Any, Any]:
    """The frozen teacher with the common weights, and a new student."""
    import timm
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(0)
    teacher = timm.create_model(
        config["teacher"], num_classes=config["classes"], img_size=config["size"]
    )
    teacher.load_state_dict(load_file(config["weights"]))
    student = timm.create_model(config["student"], num_classes=config["classes"])
    return teacher.eval(), student.train()


def plain_kd(config: Config) -> tuple[Any, Step]:
    """Cross-entropy and Hinton's loss at temperature 4, AdamW: the loop a user would write."""
    import torch
    import torch.nn.functional as F

    teacher, student = networks(config)
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)

    def step(batch: Any) -> None:
        images, labels = batch
        with torch.no_grad():
            target = teacher(images)
        logits = student(images)
        soft = F.kl_div(
            F.log_softmax(logits / 4, 1),
            F.log_softmax(target / 4, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = F.cross_entropy(logits, labels) + 16 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return loader(config), step


def timm_task(config: Config, name: str) -> tuple[Any, Step]:
    """A task of timm as its train.py runs it, with that script's default optimizer."""
    from timm import task
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
    from torch import nn

    teacher, student = networks(config)
    made = getattr(task, name)(student, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)
    made.train()
    optimizer = create_optimizer_v2(
        made.get_trainable_module(), opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9
    )

    def step(batch: Any) -> None:
        loss = made(*batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return loader(config), step


CE = {
    "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
    "criterion_wrapper": {
        "key": "SimpleLossWrapper",
        "kwargs": {
            "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
            "target": {"uses_label": True},
        },
    },
    "weight": 1.0,
}


def torchdistill_box(config: Config, method: str) -> tuple[Any, Step]:
    """A distillation box with the criterion and optimizer of the sample configuration of KD or SPKD."""
    import torch
    from torchdistill.core.distillation import get_distillation_box

    teacher, student = networks(config)
    last = {"teacher": teacher, "student": student}
    last = {role: network.feature_info[-1]["module"] for role, network in last.items()}
    ends = {"module_path": ".", "module_io": "output"}
    term: Config = {"temperature": 1.0, "alpha": 0.5, "reduction": "batchmean"}
    term |= {f"{role}_{key}": value for role in last for key, value in ends.items()}
    terms: Config = {"kd": {"criterion": {"key": "KDLoss", "kwargs": term}, "weight": 1.0}}
    hooks: Config = {role: {"input": [], "output": []} for role in last}
    optimizer = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    if method == "SPKD":
        paths = {f"{role}_output_path": path for role, path in last.items()}
        criterion = {"key": "SPKDLoss", "kwargs": {**paths, "reduction": "batchmean"}}
        terms = {"ce": CE, "spkd": {"criterion": criterion, "weight": 1.0}}
        hooks = {role: {"input": [], "output": [path]} for role, path in last.items()}
        optimizer = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
    data = {
        "dataset_id": "train",
        "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": None},
        "kwargs": {"batch_size": config["batch"], "num_workers": 0, "drop_last": True},
    }
    settings = {
        "num_epochs": 1,
        "train_data_loader": data,
        "teacher": {"forward_hook": hooks["teacher"], "requires_grad": False},
        "student": {"forward_hook": hooks["student"], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": optimizer},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    for role in ("teacher", "student"):
        settings[role]["forward_proc"] = "forward_batch_only"  # type: ignore[index]
    images = {"train": dataset(config)}
    device = torch.device("cpu")
    box = get_distillation_box(teacher, student, images, settings, device, None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step(batch: Any) -> None:
        images, labels, extra = batch
        loss = box.forward_process(images, labels, extra)
        box.post_forward_process(loss=loss)

    return box.train_data_loader, step


def lightly_method(config: Config, name: str) -> tuple[Any, Step]:
    """A method of LightlyTrain: its training_step_impl, its default optimizer, its gradient clipping."""
    from lightly_train._commands import train_helpers as helpers
    from lightly_train._methods.method_helpers import get_method_cls
    from lightly_train._models.package_helpers import get_wrapped_model
    from lightly_train._optim.optimizer_helpers import get_optimizer
    from torch.nn.utils import clip_grad_norm_

    teacher, student = networks(config)
    method_class = get_method_cls(name)
    wrapped = get_wrapped_model(student, num_input_channels=3)
    chosen = helpers.get_optimizer_args("auto", None, method_class, wrapped)
    batches = loader(config)
    scaling = helpers.get_scaling_info(dataset_size=len(batches.dataset), epochs=100)
    given = {"teacher": teacher}
    arguments = helpers.get_method_args(method_class, given, scaling, chosen, wrapped)
    embedding = helpers.get_embedding_model(wrapped)
    method = helpers.get_method(method_class, arguments, chosen, embedding, config["batch"], 3)
    method.train()
    method.teacher_embedding_model.eval()
    optimizer = get_optimizer(chosen, method.trainable_modules(), lr_scale=1.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step(batch: Any) -> None:
        loss = method.training_step_impl({"views": [batch[0]], "filename": []}, 0).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return batches, step


# system -> the package to look for, and its methods
SYSTEMS: dict[str, tuple[str, dict[str, Callable[[Config], tuple[Any, Step]]]]] = {
    "plain loop": ("torch", {"KD": plain_kd}),
    "timm.task": (
        "timm",
        {
            "logit": lambda config: timm_task(config, "LogitDistillationTask"),
            "feature": lambda config: timm_task(config, "FeatureDistillationTask"),
        },
    ),
    "torchdistill": (
        "torchdistill",
        {
            "KD": lambda config: torchdistill_box(config, "KD"),
            "SPKD": lambda config: torchdistill_box(config, "SPKD"),
        },
    ),
    "LightlyTrain": (
        "lightly-train",
        {"distillationv3": lambda config: lightly_method(config, "distillationv3")},
    ),
}


def measure(batches: Iterator[Any], step: Step, count: int) -> Config:
    """Make `count` steps; their images, seconds, seconds of them for the data, and CPU seconds of the process."""
    images, waited = 0, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        step(batch)
        images += len(batch[0])
    return {
        "images": images,
        "wall_s": time.perf_counter() - wall,
        "data_s": waited,
        "cpu_s": time.process_time() - cpu,
    }


def forever(loader: Any) -> Iterator[Any]:
    """The batches of epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def serve(config: Config, answer: Callable[[Config], None]) -> None:
    """Build the steps of the system and make them as they are requested."""
    package, builders = SYSTEMS[config["system"]]
    try:
        versions = {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        answer({"not_installed": f"no package {package} in its environment"})
        return
    import torch

    torch.set_num_threads(config["threads"])
    for name in ("torch", "timm"):
        versions[name] = importlib.metadata.version(name)
    steps, failed = {}, {}
    for method in config["methods"]:
        try:
            loader, step = builders[method](config)
            steps[method] = forever(loader), step
            measure(*steps[method], 1)
        except Exception as error:
            logging.exception(method)
            failed[method] = f"{type(error).__name__}: {error}"
    answer({"versions": versions, "failed": failed})
    for line in sys.stdin:
        request = json.loads(line)
        answer(measure(*steps[request["method"]], request["steps"]))


def main() -> None:
    """Keep standard output for the answers: what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Config) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    serve(json.loads(sys.argv[1]), answer)


if __name__ == "__main__":
    main()
