"""``vllm-ext serve``: vLLM's own OpenAI-compatible server, with our flags and checks.

Every flag of ``vllm serve`` passes through. It also works with the CPU wheel, whose own
``vllm`` command crashes on a metadata look-up.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from attn_backends.config import POLICY_KEY, ConfigError, parse_config
from attn_backends.methods import REGISTRY, load_method
from attn_backends.policy.model import PolicyError
from vllm_ext import access, plugin
from vllm_ext.cli.cpu_defaults import default_chunk, default_dtype, default_kv_pool_bytes
from vllm_ext.cli.flags import POLICY_FLAG, add_setting_flags, flag_of, merge_additional_config
from vllm_ext.cli.policy_file import PolicyFile, methods_with_policy, read_policy, require_method
from vllm_ext.cli.ready import announce_when_ready, in_url
from vllm_ext.errors import UserError
from vllm_ext.methods import speculation

EPILOG = """
every flag of `vllm serve` works too; `vllm-ext serve --help=all` lists them all

  vllm-ext serve models/smollm2-135m-instruct --attention-backend SINK_WINDOW --window-tokens 512
"""


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-ext serve",
        usage="vllm-ext serve MODEL [options]",
        description="Start an OpenAI-compatible server on a model folder or Hugging Face name.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--attention-backend",
        metavar="NAME",
        help=f"{', '.join(REGISTRY)}, or any backend of vLLM (default: vLLM's own choice)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to bind (8000)")
    parser.add_argument("--additional-config", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument(
        POLICY_FLAG,
        metavar="FILE|JSON",
        help="a policy of layers, budgets and presets, YAML or JSON, for "
        f"{' or '.join(methods_with_policy())}",
    )
    add_setting_flags(parser)
    return parser


def check_model(model: str | None) -> None:
    """Refuses a path that leads nowhere, before vLLM asks the hub for it.

    Raises:
        UserError: no model, or a folder that is not there.
    """
    if not model:
        raise UserError(
            "no model given; `vllm-ext demo-model` prepares one, then: "
            "vllm-ext serve models/smollm2-135m-instruct"
        )
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(
                f"model folder {model} has no config.json; is it a Hugging Face folder?"
            )
        return
    looks_local = model.startswith(("/", "./", "../", "~", "models/")) or model.count("/") > 1
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise UserError(
            f"model folder {model} does not exist (looked in {Path.cwd()}); "
            "`vllm-ext demo-model` prepares models/smollm2-135m-instruct"
        )


def check_port(host: str, port: int) -> None:
    """Refuses a port that is taken, before a minute of loading.

    Raises:
        UserError: the address cannot be bound.
    """
    if not 0 < port < 65536:
        raise UserError(f"--port is {port}; it must be between 1 and 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {in_url(host)}:{port}: {error.strerror}. If another server runs "
                f"there, stop it or choose another --port (for example {port + 1})"
            ) from None


def check_settings(backend: str, settings: dict[str, Any] | None) -> None:
    """Validates our settings before vLLM is loaded.

    Args:
        backend: the upper-case name, or an empty string.
        settings: what will stand under ``vllm_ext``, or None.

    Raises:
        ConfigError: a bad setting.
        UserError: settings of ours without a method of ours.
    """
    if settings is None:
        return
    if backend not in REGISTRY:
        raise UserError(
            f"{', '.join(settings)} given, but --attention-backend is {backend or 'not'}"
            f"{'' if backend else ' given'}; choose one of {', '.join(REGISTRY)}"
        )
    parse_config(load_method(backend).config_cls, settings, backend)


def speculative_flag(
    model: str | None, backend: str, settings: dict[str, Any] | None, rest: list[str]
) -> list[str]:
    """``--speculative-config`` where sparse rows only draft, unless the user wrote it.

    Args:
        model: the leading word, if it was one.
        backend: the upper-case name.
        settings: valid ones of it, or None.
        rest: flags for vLLM.

    Raises:
        UserError: nobody knows the model's name yet.
    """
    given = {word.split("=")[0].replace("_", "-") for word in rest}
    if settings is None or {"--speculative-config", "-sc"} & given:
        return []
    arguments = speculation(backend, settings, model or "")
    if arguments is None:
        return []
    if model is None:
        raise UserError(
            "--lossless-tokens names the model to vLLM once more: give it as the first word, "
            "vllm-ext serve MODEL ..."
        )
    return ["--speculative-config", json.dumps(arguments)]


def vllm_arguments(
    model: str | None, own: argparse.Namespace, rest: list[str], policy: PolicyFile | None = None
) -> list[str]:
    """The argument list for vLLM's parser.

    Args:
        model: the leading word, if it was one.
        own: what our parser took.
        rest: what it left for vLLM's.
        policy: of ``--sparse-config``.

    Raises:
        ConfigError: a bad setting.
        UserError: a bad policy, with its line; or what does not go together.
    """
    others = ("attention_backend", "host", "port", "additional_config", "sparse_config")
    settings = {name: value for name, value in vars(own).items() if name not in others}
    argv = [model] if model else []
    argv += ["--host", own.host, "--port", str(own.port), *rest]
    backend = (own.attention_backend or "").upper()
    if backend:
        argv += ["--attention-backend", backend]
    if policy is not None:
        require_method(backend)
        policy.require_agreement(settings, flag_of)
        settings[POLICY_KEY] = policy.content
    merged = merge_additional_config(own.additional_config, settings)
    if policy is not None:
        policy.require_agreement(merged["vllm_ext"], "vllm_ext.{} in --additional-config".format)
    try:
        check_settings(backend, merged.get("vllm_ext"))
    except PolicyError as error:
        raise (error if policy is None else policy.located(error)) from None
    if merged:
        argv += ["--additional-config", json.dumps(merged)]
        argv += speculative_flag(model, backend, merged.get("vllm_ext"), rest)
    argv += default_dtype(rest)
    argv += default_chunk(rest, backend)
    pool_bytes = default_kv_pool_bytes(rest)
    if pool_bytes is not None:
        argv += ["--kv-cache-memory-bytes", str(pool_bytes)]
        print(
            f"vllm-ext: KV pool {pool_bytes / (1 << 30):.1f} GiB "
            "(choose another size with --kv-cache-memory-bytes)",
            flush=True,
        )
    return argv


def _vllm_parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(_with_suggestions(message, list(self._option_string_actions)))

    return make_arg_parser(Parser(prog="vllm-ext serve", usage="vllm-ext serve MODEL [options]"))


def _with_suggestions(message: str, flags: list[str]) -> str:
    if not message.startswith("unrecognized arguments:"):
        return f"{message} (see vllm-ext serve --help)"
    unknown = [word for word in message.split()[2:] if word.startswith("-")]
    ours = [option for action in _own_parser()._actions for option in action.option_strings]
    hints = [
        f"{word}: did you mean {close[0]}?"
        for word in unknown
        if (close := difflib.get_close_matches(word.split("=")[0], [*flags, *ours], 1))
    ]
    return "; ".join([message, *hints]) + " (see vllm-ext serve --help)"


def require_key_everywhere(args: Any) -> None:
    """Adds the middleware that asks for the API key on every route, where a key is set.

    Args:
        args: vLLM's parsed arguments; ``middleware`` is extended.

    Raises:
        UserError: a key, and a front end that does not run the middleware.
    """
    if not access.api_keys(args):
        return
    other = {
        "--grpc": getattr(args, "grpc", False),
        "--grpc-port": getattr(args, "grpc_port", None) is not None,
        "VLLM_USE_RUST_FRONTEND": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
    }
    for name, is_used in other.items():
        if is_used:
            raise UserError(
                f"an API key is set, but {name} starts a front end that does not ask for it on "
                f"every route; drop {name}, or the key"
            )
    if access.MIDDLEWARE not in args.middleware:
        args.middleware = [*args.middleware, access.MIDDLEWARE]


def _reason(error: BaseException, policy: PolicyFile | None) -> str:
    """The user-facing part of an error that vLLM may have wrapped."""
    details = getattr(error, "errors", None)  # pydantic's ValidationError
    items = details() if callable(details) else []
    for cause in (error, *(item.get("ctx", {}).get("error") for item in items)):
        if policy is not None and isinstance(cause, PolicyError):
            return str(policy.located(cause))
    texts = (str(item["msg"]).removeprefix("Value error, ") for item in items)
    return "; ".join(texts) if items else str(error)


def main(argv: list[str]) -> int:
    """Runs the server until it is stopped.

    Raises:
        UserError: bad input; one line says what would work.
    """
    if any(word.startswith("--help=") for word in argv):
        _vllm_parser().parse_args(argv)
    # Only a leading word is surely the model: a later one may be the value of a vLLM flag.
    model, options = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else (None, argv)
    own, rest = _own_parser().parse_known_args(options)
    if plugin.disabled() and (own.attention_backend or "").upper() in REGISTRY:
        raise UserError(f"{own.attention_backend} was asked for, but {plugin.DISABLE_ENV} is set")
    try:
        plugin.require_supported_vllm()
    except plugin.UnsupportedVersion as error:
        raise UserError(str(error)) from None
    if model or not any(word[:1] != "-" for word in rest):
        check_model(model)
    if not {"--uds", "--headless"} & {word.split("=")[0] for word in rest}:
        check_port(own.host, own.port)
    policy = None if own.sparse_config is None else read_policy(own.sparse_config)
    return _run(vllm_arguments(model, own, rest, policy), policy)


def _run(argv: list[str], policy: PolicyFile | None) -> int:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    args = _vllm_parser().parse_args(argv)
    if args.model_tag is None and not {"--model", "--config"} & {a.split("=")[0] for a in argv}:
        check_model(None)
    args.model = args.model_tag or args.model
    check_model(args.model)
    require_key_everywhere(args)
    try:
        validate_parsed_serve_args(args)
        if not (args.headless or args.grpc):  # those answer no HTTP
            threading.Thread(target=announce_when_ready, args=(args,), daemon=True).start()
        ServeSubcommand.cmd(args)
    except (ConfigError, ValueError, TypeError) as error:
        raise UserError(_reason(error, policy)) from None
    except (RuntimeError, OSError) as error:
        print(f"\nvllm-ext serve: the engine did not start: {error}", file=sys.stderr)
        print("The first error above this line is the cause.", file=sys.stderr)
        return 1
    return 0
