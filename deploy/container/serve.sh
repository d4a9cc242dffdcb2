#!/bin/sh
# Entry point of the container: vllm-ext serve on all of the container's addresses, never without a key.
#   serve.sh MODEL [flags of vllm-ext serve]
set -eu
secret=/run/secrets/vllm-api-key
if [ -z "${VLLM_API_KEY:-}" ] && [ -r "$secret" ]; then
  VLLM_API_KEY=$(cat "$secret")
  export VLLM_API_KEY
fi
case " $* " in
  *" --help"*) exec vllm-ext serve "$@" ;;
esac
if [ -z "${VLLM_API_KEY:-}" ]; then
  echo "serve.sh: error: set VLLM_API_KEY, or mount a secret at $secret: this server listens on every" \
    "address of the container" >&2
  exit 2
fi
# exec: signals reach the server. --host and --port come last, so that they win.
exec vllm-ext serve "$@" --host 0.0.0.0 --port 8000
