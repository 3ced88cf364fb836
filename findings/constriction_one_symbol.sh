#!/usr/bin/env bash
# constriction 0.5.0: a source of one symbol is refused, though a symbol of probability 0 is not.
# Expected: codes that are all equal cost no bits, and what has probability 0 cannot be coded. Seen: Categorical([1.0])
# raises a ValueError that speaks of empty, negative or NaN probabilities; Categorical([1.0, 0.0]) works, costs 0 bits, and
# codes the symbol of probability 0 too. An empty coder decodes into as many symbols as are asked for, without an error: a
# length must be kept beside the words.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "constriction==0.5.0" "numpy==2.4.6"
"$work/venv/bin/python" - <<'PY'
import constriction
import numpy as np

stream = constriction.stream


def categorical(*probabilities):
    return stream.model.Categorical(np.array(probabilities, np.float32), perfect=False)


def round_trip(model, symbols):
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(np.array(symbols, np.int32), model)
    words = coder.get_compressed()
    return stream.stack.AnsCoder(words).decode(model, len(symbols)).tolist(), 32 * len(words)


try:
    categorical(1.0)
    refused = ""
except ValueError as e:
    refused = str(e)
same, bits = round_trip(categorical(1.0, 0.0), [0] * 100)
never, _ = round_trip(categorical(1.0, 0.0), [0, 1, 0])
from_nothing = stream.stack.AnsCoder(np.array([], np.uint32)).decode(categorical(0.5, 0.5), 5).tolist()
print("constriction 0.5.0, one symbol:", refused.split("(")[0].strip() or "accepted")
print(f"one symbol and one of probability 0: {bits} bits for 100 symbols; [0, 1, 0] comes back as {never}")
print("five symbols from no words:", from_nothing)
assert "not normalizable" in refused and same == [0] * 100 and bits <= 32 and never == [0, 1, 0] and len(from_nothing) == 5
PY
