"""The benchmarks run, on small sizes: what they print is asked for by people, not by this test."""

from __future__ import annotations

import json

from benchmarks import containers, store


def test_the_containers_give_back_the_same_records(monkeypatch, tmp_path):
    chosen = {
        k: v
        for k, v in containers.CONTAINERS.items()
        if v.__name__ in ("ours", "one_file_an_image")
    }
    monkeypatch.setattr(containers, "CONTAINERS", chosen)
    monkeypatch.setattr(containers, "SHARD", 40)
    batches = []
    for write in chosen.values():
        folder = tmp_path / write.__name__
        folder.mkdir()
        read = write(folder, 100)()
        batches.append(read(containers.np.array([99, 3, 41, 40])).clone())
    assert (batches[0] == batches[1]).all()
    shown = containers.table(containers.measure(100, tmp_path))
    assert shown.count("×") == 8 and "ms of CPU a record" in shown


def test_a_cached_step_is_held_against_the_same_step_online(tmp_path, capsys):
    line = f"--folder {tmp_path} --out {tmp_path}/out step --teacher test_vit --student test_resnet"
    sizes = "--size 160 --batch 4 --images 20 --turns 2 --workers 0"
    args = store.parser().parse_args([*line.split(), *sizes.split()])
    store.main(args)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["first_loss_relative_difference"]["tokens"] <= 4 * found["manifest_error"]
    assert set(found["step_ms"]) == {"cached", "online"} and 0 < found["stall_fraction"] < 1
    text = (tmp_path / "out.md").read_text()
    assert "An online step takes" in text and "An online step takes" in capsys.readouterr().out
    assert "python -m benchmarks.store step --teacher test_vit" in text
