"""Every target's Ray config carries the same method, settled and safe, and names what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.ray.local import load_config
from deploy.ray.settings import check_engine_kwargs
from vllm_ext.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy/ray").glob("*.yaml"))
METHOD_KEYS = ("attention_backend", "additional_config")


def _serve_config(path: Path) -> dict[str, Any]:
    """The Serve part: the whole file, or the string inside a RayService."""
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    if content.get("kind") == "RayService":
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    return content


def _args(path: Path) -> dict[str, Any]:
    (application,) = _serve_config(path)["applications"]
    assert application["import_path"] == "deploy.ray.app:build"
    args: dict[str, Any] = application["args"]
    return args


def test_there_is_one_file_per_target() -> None:
    assert [path.stem for path in FILES] == [
        "autoscaled-cluster",
        "kuberay-rayservice",
        "local-cpu",
        "one-gpu-node",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_method_is_valid_and_the_same_everywhere(path: Path) -> None:
    reference = _args(FILES[0])["llm_configs"][0]["engine_kwargs"]
    for model in _args(path)["llm_configs"]:
        kwargs = model["engine_kwargs"]
        check_engine_kwargs(model["model_loading_config"]["model_id"], kwargs)
        assert {key: kwargs[key] for key in METHOD_KEYS} == {
            key: reference[key] for key in METHOD_KEYS
        }
        assert kwargs["additional_config"]["vllm_ext"]["strict"] is True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_others_can_reach_asks_for_a_key(path: Path) -> None:
    http = _serve_config(path)["http_options"]
    assert http["host"] == "127.0.0.1" or _args(path)["require_api_key"] is True
    assert http["request_timeout_s"] is not None  # no request hangs for ever


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_file_names_is_there(path: Path) -> None:
    """As Serve imports it; a router is named in those with several replicas."""
    pytest.importorskip("ray", reason="Ray is not installed: scripts/setup.sh ray")
    pytest.importorskip("vllm")
    from ray._common.utils import import_attr

    (application,) = _serve_config(path)["applications"]
    assert callable(import_attr(application["import_path"]))
    for model in application["args"]["llm_configs"]:
        router = model["deployment_config"].get("request_router_config", {})
        assert bool(router) == (path.stem != "one-gpu-node")
        assert not router or isinstance(import_attr(router["request_router_class"]), type)


def test_kuberay_serves_the_autoscaled_application() -> None:
    by_name = {path.stem: path for path in FILES}
    cluster, kuberay = by_name["autoscaled-cluster"], by_name["kuberay-rayservice"]
    assert _serve_config(kuberay) == _serve_config(cluster)


def test_the_local_config_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models/smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr("deploy.ray.local.ROOT", tmp_path)
    config = load_config(ROOT / "deploy/ray/local-cpu.yaml", None)
    (model,) = config["applications"][0]["args"]["llm_configs"]
    assert model["model_loading_config"]["model_source"] == str(folder)
    assert model["deployment_config"]["num_replicas"] == 2
    assert config["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, ["attention_backend is None", "TIDAL_DECODE", "build_openai_app"]),
        ({"attention_backend": "FLASH_ATTN"}, ["FLASH_ATTN"]),
        (
            {
                "attention_backend": "TIDAL_DECODE",
                "additional_config": {"vllm_ext": {"budget_tokns": 5}},
            },
            ["budget_tokns", "budget_tokens"],
        ),
        (
            {
                "attention_backend": "TIDAL_DECODE",
                "additional_config": {"vllm_ext": {"lossless_tokens": 3}},
            },
            ["engine_kwargs.speculative_config", '"num_speculative_tokens": 3', "model_source"],
        ),
    ],
)
def test_settings_that_would_not_be_honoured_are_refused(
    kwargs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises((ConfigError, UserError)) as refused:
        check_engine_kwargs("m", kwargs)
    for word in words:
        assert word in str(refused.value)


def test_a_file_that_is_no_serve_config_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("applications: []")
    with pytest.raises(UserError, match=r"other\.yaml"):
        load_config(path, None)


def test_requirement_files_agree() -> None:
    pins: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            name, _, version = line.partition("==")
            if version:
                pins.setdefault(name.lower().replace("_", "-"), set()).add(version)
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
