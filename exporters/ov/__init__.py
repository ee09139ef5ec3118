"""OpenVINO: conversion of an ONNX file to IR, and the session."""
