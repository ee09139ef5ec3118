"""OpenVINO: conversion of an ONNX file to IR, the session."""
