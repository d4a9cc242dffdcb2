"""Two Ray replicas on this machine, until Ctrl-C.

    make ray
    .venv/bin/python -m deploy.ray.local --config deploy/ray/local-cpu.yaml --port 8000

Starts a Ray of its own on loopback with fixed ports, runs the Serve config on it, and takes
both down at the end. Other Rays of this machine are left alone (``ray stop`` would not). Some of
Ray's ports listen on all interfaces whatever its address, so that it asks for a token.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from deploy.ray.settings import check_engine_kwargs
from vllm_ext.cli.serve import check_model, check_port
from vllm_ext.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
NODE_ADDRESS = "127.0.0.2"  # Ray replaces 127.0.0.1 by an address that others can reach
# The node's ports, by offset from --ray-port; workers take the rest of PORT_SPAN.
PORT_FLAGS = (
    "--port",
    "--node-manager-port",
    "--object-manager-port",
    "--runtime-env-agent-port",
    "--dashboard-agent-grpc-port",
    "--dashboard-agent-listen-port",
    "--metrics-export-port",
    "--min-worker-port",
)
PORT_SPAN = 80
OBJECT_STORE_BYTES = 200 << 20  # prompts and answers are small
STOP_S = 60


def use_token() -> None:
    """Makes this process, its children and its Ray use this environment's token."""
    path = Path(sys.prefix) / "ray-auth-token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(path))


def join(address: str) -> None:
    """Connects this process to a node that uses this environment's token."""
    use_token()
    logging.disable(logging.WARNING)  # Serve's status imports vLLM, which tells its own story
    import ray

    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")


def ray_ports(first: int) -> dict[str, int]:
    """The node's ports by ``ray start`` flag."""
    ports = {flag: first + offset for offset, flag in enumerate(PORT_FLAGS)}
    return ports | {"--max-worker-port": first + PORT_SPAN - 1}


def load_config(path: Path, port: int | None) -> dict[str, Any]:
    """The Serve config with local model folders made absolute.

    Args:
        path: a YAML file as in ``deploy/ray/``.
        port: replaces the file's HTTP port.

    Raises:
        UserError: not such a file, a model folder that is not there, or no method of ours.
        ConfigError: settings that cannot be honoured.
    """
    try:
        config: Any = yaml.safe_load(path.read_text())
        models = config["applications"][0]["args"]["llm_configs"]
        http = config["http_options"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise UserError(
            f"--config {path} is not a Serve config like deploy/ray/local-cpu.yaml: {error!r}"
        ) from None
    for model in models:
        loading = model["model_loading_config"]
        check_engine_kwargs(loading["model_id"], model["engine_kwargs"])
        source = loading.get("model_source", loading["model_id"])
        folder = ROOT / source
        if source.startswith("models/"):
            check_model(str(folder))
            loading["model_source"] = str(folder)
    if port is not None:
        http["port"] = port
    check_port(http["host"], http["port"])
    return dict(config)


@contextmanager
def running(name: str, argv: list[str], log: Path) -> Iterator[Any]:
    """A child process, terminated at the end and, if that takes long, killed."""
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches us only, and we end children in order.
        child = subprocess.Popen(
            argv, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
    try:
        yield child
    finally:
        print(f"vllm-ext: stopping {name} ...", flush=True)
        child.terminate()
        try:
            child.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            print(f"vllm-ext: {name} did not stop within {STOP_S} s; killed", file=sys.stderr)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def head_command(first_port: int, num_cpus: int, num_gpus: int) -> list[str]:
    """``ray start`` for a node that only this machine reaches."""
    argv = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    argv += ["--node-ip-address", NODE_ADDRESS]
    argv += ["--num-cpus", str(num_cpus), "--num-gpus", str(num_gpus)]
    argv += ["--include-dashboard", "false", "--disable-usage-stats"]
    argv += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
    return argv + [f"{flag}={port}" for flag, port in ray_ports(first_port).items()]


def wait_for_port(address: str, port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    """Until something listens.

    Raises:
        UserError: the child ended, or nothing listened for a minute.
    """
    until = time.monotonic() + 60
    while time.monotonic() < until and child.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((address, port)) == 0:
                return
        time.sleep(0.3)
    raise UserError(f"Ray did not start; the end of its log:\n{log.read_text()[-2000:]}")


def wait_until_serving(address: str, applications: int, child: Any, log: Path) -> None:
    """Until every application is running: ``/v1/models`` answers before the engines do.

    Raises:
        UserError: an application failed; the message is Serve's.
    """
    join(address)
    signal.signal(signal.SIGTERM, _stop)  # Ray's own handler aborts, and children would stay
    from ray import serve

    while child.poll() is None:
        time.sleep(1)
        states = serve.status().applications
        for name, state in states.items():
            if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise UserError(f"application {name}: {state.status}\n{state.message[-3000:]}")
        if len(states) == applications and all(s.status == "RUNNING" for s in states.values()):
            return
    raise UserError(f"`serve run` ended; the end of its log:\n{log.read_text()[-3000:]}")


def curl_line(config: dict[str, Any]) -> str:
    """A command that asks the first model a question; a key stays in the environment."""
    http = config["http_options"]
    model = config["applications"][0]["args"]["llm_configs"][0]["model_loading_config"]["model_id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    auth = ' -H "Authorization: Bearer $VLLM_API_KEY"' if os.environ.get("VLLM_API_KEY") else ""
    return (
        f"curl -s http://{http['host']}:{http['port']}/v1/chat/completions "
        f"-H 'Content-Type: application/json'{auth} -d '{json.dumps(body)}'"
    )


def answers(config: dict[str, Any]) -> bool:
    """Whether the ingress is there; with a key set, its refusal of none is an answer too."""
    http = config["http_options"]
    try:
        urllib.request.urlopen(f"http://{http['host']}:{http['port']}/v1/models", timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    except OSError:
        return False
    return True


def run(args: argparse.Namespace) -> None:
    """Starts everything, says so, and waits for a signal.

    Raises:
        UserError: a port is taken, or something did not start.
    """
    config = load_config(args.config, args.port)
    use_token()
    for port in ray_ports(args.ray_port).values():
        check_port(NODE_ADDRESS, port)
    applications = config["applications"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-ext-ray-")))
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        # Ray's workers would yield to everything else on the machine (niceness 15).
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray would wait half a minute for Serve to move the replicas to another node.
        os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
        log = folder / "ray.log"
        argv = head_command(args.ray_port, args.num_cpus, args.num_gpus)
        head = stack.enter_context(running("Ray", argv, log))
        wait_for_port(NODE_ADDRESS, args.ray_port, head, log)
        address = f"{NODE_ADDRESS}:{args.ray_port}"
        print(f"vllm-ext: Ray runs on {address}; loading the replicas ...", flush=True)
        serve_argv = [str(Path(sys.executable).with_name("serve")), "run", "--address", address]
        serve_log = folder / "serve.log"
        serving = stack.enter_context(
            running("Serve", [*serve_argv, str(folder / "serve.yaml")], serve_log)
        )
        wait_until_serving(address, len(applications), serving, serve_log)
        while not answers(config):
            time.sleep(0.5)
        http = config["http_options"]
        metrics_port = ray_ports(args.ray_port)["--metrics-export-port"]
        print(
            f"\nvllm-ext: ready on http://{http['host']}:{http['port']} (Ray {address}, metrics "
            f"http://{NODE_ADDRESS}:{metrics_port}/metrics). Try it:\n\n  {curl_line(config)}\n",
            flush=True,
        )
        while serving.poll() is None and head.poll() is None:
            time.sleep(0.5)
        raise UserError(f"Ray or Serve ended by itself:\n{serve_log.read_text()[-3000:]}")


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Command line; 0 after Ctrl-C, 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.ray.local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("local-cpu.yaml"))
    parser.add_argument("--port", type=int, help="HTTP port in place of the config's")
    parser.add_argument(
        "--ray-port", type=int, default=8310, help=f"first of {PORT_SPAN} ports for Ray (8310)"
    )
    parser.add_argument("--num-cpus", type=int, default=2, help="what Ray may schedule (2)")
    parser.add_argument("--num-gpus", type=int, default=0, help="what Ray may schedule (0)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nvllm-ext: stopped", flush=True)
        return 0
    except (ConfigError, UserError) as error:
        print(f"vllm-ext ray: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
