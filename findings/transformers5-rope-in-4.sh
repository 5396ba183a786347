#!/usr/bin/env bash
# A model saved by transformers 5 loses the base and the scaling of its rotary embedding in 4.x.
#
# Versions   written by transformers 5.23.0, read by 4.51.3 and 4.57.6, the last of that line
# Guess      `save_pretrained` writes a config.json that the release before reads as well, or that
#            it refuses: the architecture is as old as both, and so is the format of the folder.
# Seen       Version 5 writes base and scaling into `rope_parameters` alone. Version 4 keeps that
#            entry as one that it does not know, and computes with the defaults of the
#            architecture: a base of 10,000 where the model has 500,000 or 1,000,000, and no
#            scaling. No warning, not even at the level of information.
# Matters    Fine-tune a Llama 3.1 with 5.x and evaluate or serve it where 4.x is pinned (reward
#            benchmarks, evaluation harnesses, many images): every position is read wrongly. Text
#            still comes out, scores are lower, and training gets the blame. A folder that has
#            `rope_theta` and `rope_scaling` beside the new entry is read rightly by both.
#
# Configurations alone, without torch: about 300 MB, a minute. Ends with an error where it behaves
# otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 5.23.0 4.51.3 4.57.6; do python3 -m venv "$version"; done
5.23.0/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0
4.51.3/bin/pip install --quiet --disable-pip-version-check transformers==4.51.3
4.57.6/bin/pip install --quiet --disable-pip-version-check transformers==4.57.6

cat > write.py <<'PYTHON'
import json
from pathlib import Path

from transformers import LlamaConfig, Qwen3Config

scaling = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LlamaConfig(
    rope_parameters={"rope_theta": 500000.0, **scaling}, max_position_embeddings=131072
).save_pretrained("llama")
Qwen3Config(rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}).save_pretrained(
    "qwen3"
)
both = json.loads(Path("llama/config.json").read_text())
both |= {"rope_theta": 500000.0, "rope_scaling": scaling}
Path("both").mkdir()
Path("both/config.json").write_text(json.dumps(both))
PYTHON

cat > read.py <<'PYTHON'
import json
import logging

import transformers
from transformers import AutoConfig

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
transformers.logging.set_verbosity_info()
logging.getLogger("transformers").addHandler(handler)
found = {}
for folder in ("llama", "qwen3", "both"):
    config = AutoConfig.from_pretrained(folder)
    new = getattr(config, "rope_parameters", None) or {}
    old = getattr(config, "rope_theta", None)
    if transformers.__version__.startswith("5"):
        found[folder] = [new["rope_theta"], new.get("factor")]
    else:
        found[folder] = [old, (config.rope_scaling or {}).get("factor")]
rope = [line for line in said if "rope" in line.lower() and "Model config" not in line]
print(json.dumps({"read": found, "said about it": rope}))
PYTHON

5.23.0/bin/python write.py 2> /dev/null
for version in 5.23.0 4.51.3 4.57.6; do
    echo "$version $("$version/bin/python" read.py 2> /dev/null)" | tee -a seen.txt
done

python3 - <<'PYTHON'
import json

seen = {line.split()[0]: json.loads(line.split(" ", 1)[1]) for line in open("seen.txt")}
right = {"llama": [500000.0, 8.0], "qwen3": [1000000.0, None], "both": [500000.0, 8.0]}
assert seen["5.23.0"]["read"] == right, "5.x reads its own folders otherwise"
for version in ("4.51.3", "4.57.6"):
    assert seen[version]["read"] == {**right, "llama": [10000.0, None], "qwen3": [10000.0, None]}
    assert not seen[version]["said about it"], f"{version} says something about it"
print("base and scaling are lost in silence; with the old entries beside the new one they are not")
PYTHON
