"""The environment's illnesses, planted one by one; a healthy one has no failure, and no token is ever told."""

import importlib.metadata
import os
import time
import types

import psutil
import pytest
import torch

from ctxext.doctor import environment as env
from ctxext.doctor.finding import Finding, require_health
from ctxext.errors import CheckFailed


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No hub, no cache of the user's, no build of DeepSpeed's."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_this_environment_has_no_failure():
    found = env.environment()
    assert [finding for finding in found if finding.status == "failure"] == []
    named = by_name(found)
    assert {"python", "packages", "kernel blocked", "kernel varlen", "kernel flex", "hub", "memory"} <= named.keys()
    assert named["kernel blocked"].found.startswith("ran on the")
    require_health(found)


def test_a_hub_that_cannot_be_reached_is_a_warning_with_a_remedy():
    (found,) = env._hub()
    assert found.status == "warning" and "HF_HUB_OFFLINE" in found.remedy and "127.0.0.1" in found.found


def test_offline_is_not_asked(monkeypatch):
    assert env._hub({"HF_HUB_OFFLINE": "1"})[0].status == "ok"


def test_a_token_is_found_and_never_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretindeed")
    (found,) = env._hub()
    assert "a token is present" in found.found and "verysecret" not in str(found)


def test_a_stale_lock_of_a_build_is_a_failure_and_a_fresh_one_a_warning(tmp_path):
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert by_name(env._builds())["DeepSpeed builds"].status == "warning"
    os.utime(lock, (time.time() - 3600,) * 2)
    found = by_name(env._builds())["DeepSpeed builds"]
    assert found.status == "failure" and found.remedy.startswith(f"rm {lock}") and "1 h old" in found.found
    with pytest.raises(CheckFailed, match="DeepSpeed builds"):
        require_health([found])


def test_packages_that_are_missing_or_out_of_range_are_named(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "psutil":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.57.0" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = by_name(env._versions())
    assert found["transformers"].status == "failure" and "<6,>=5.17" in found["transformers"].found
    assert found["transformers"].remedy == "pip install 'transformers<6,>=5.17'"
    assert found["psutil"].found == "not installed" and found["psutil"].status == "failure"


def test_an_optional_package_is_a_warning_where_it_is_too_old_and_nothing_where_it_is_missing(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "scikit-learn" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = by_name(env._versions())
    assert found["scikit-learn"].status == "warning" and "0.1.0, outside >=" in found["scikit-learn"].found
    assert "gguf" not in found and "gguf" not in found["packages"].found


def test_a_missing_compiler_little_memory_and_little_disk_are_warnings(monkeypatch):
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    assert "install g++" in by_name(env._builds())["C++ compiler"].remedy
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10**8, total=10**9))
    monkeypatch.setattr(env.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    found = by_name(env._room())
    assert found["memory"].status == found["disk here"].status == "warning"


def test_a_broken_kernel_is_a_failure(monkeypatch):
    from ctxext.ops.backends import choice

    def broken(*arguments, **settings):
        raise RuntimeError("undefined symbol: _ZN2at")

    monkeypatch.setattr(choice, "attention", broken)
    found = by_name(env._kernels())["kernel blocked"]
    assert found.status == "failure" and "undefined symbol" in found.found and found.remedy


def test_a_driver_without_a_gpu_for_torch_is_a_failure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(env.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (found,) = env._gpu()
    assert found.status == "failure" and "sees no GPU" in found.found


def test_health_is_required_of_failures_alone():
    require_health([Finding("a", "warning", "odd", "look")])
    with pytest.raises(CheckFailed, match="1 failed: b") as failed:
        require_health([Finding("a", "ok", "fine"), Finding("b", "failure", "ill", "mend it")])
    assert failed.value.hint == "mend it" and failed.value.exit_code == 1
