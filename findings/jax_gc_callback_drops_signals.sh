#!/usr/bin/env bash
# jax 0.12.0.1, Python 3.12: importing JAX makes a Ctrl-C, or a handler of SIGTERM that raises, go lost now and then.
# Expected: an exception that a signal handler raises reaches the main thread's code, as it does without JAX.
# Seen: JAX puts a callback of its own into gc.callbacks. A handler that runs inside it raises into the collector, which
# prints "Exception ignored in" and goes on: the program does not stop. In a loop that does nothing but collect, 890 of
# 1000 signals went lost, without JAX none. A handler that sets a flag, looked at between steps, loses nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
cat > "$work/signals.py" <<'PY'
import gc
import signal
import sys

if sys.argv[1] == "jax":
    import jax  # noqa: F401

armed, raised, caught, said = False, 0, 0, set()


def handler(number, frame):
    global armed, raised
    if armed:
        armed = False
        raised += 1
        raise KeyboardInterrupt


sys.unraisablehook = lambda unraisable: said.add(getattr(unraisable.object, "__name__", repr(unraisable.object)))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
for _ in range(1000):
    try:
        armed = True
        while armed:
            gc.collect(0)
    except KeyboardInterrupt:
        caught += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(sys.argv[1], raised, raised - caught, *sorted(said))
PY
alone=$("$work/venv/bin/python" "$work/signals.py" alone)
with=$(JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/signals.py" jax)
echo "signals raised, lost, and where: $alone; $with"
read -r _ _ lost _ <<<"$alone"
[ "$lost" -eq 0 ] || { echo "changed: signals go lost without JAX"; exit 1; }
read -r _ _ lost where <<<"$with"
[ "$lost" -gt 0 ] || { echo "changed: no signal went lost in JAX's callback"; exit 1; }
case "$where" in *xla_gc_callback*) ;; *) echo "changed: they went lost in $where"; exit 1 ;; esac
