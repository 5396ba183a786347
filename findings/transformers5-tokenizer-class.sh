#!/usr/bin/env bash
# AutoTokenizer of transformers 5 splits text by a class's own rules, not by those of tokenizer.json.
#
# Versions   transformers 5.23.0 beside 4.57.6, tokenizers as each brings it
# Guess      A folder with tokenizer.json is read as that file says: vocabulary, merges, and the
#            pre-tokenizer before them. Version 4 does so, whatever the model's type.
# Seen       Version 5 takes vocabulary and merges from the file, and pre-tokenizer, normaliser and
#            decoder from the class that it has for the model's type. A model whose tokenizer was
#            trained with other rules (its own digits, a blank before the first word, another
#            regular expression) gets other ids for plain English, and no warning. Saving what was
#            read writes the other rules into the new folder's tokenizer.json.
# Matters    The model reads pieces that it has hardly seen, in training and in evaluation; rewards
#            and log-probabilities are of another text than the user's. `PreTrainedTokenizerFast`
#            in the place of AutoTokenizer follows the file in both versions.
#
# Without torch: about 200 MB, a minute. Ends with an error where it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 4.57.6 5.23.0; do python3 -m venv "$version"; done
4.57.6/bin/pip install --quiet --disable-pip-version-check transformers==4.57.6
5.23.0/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0

cat > write.py <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config

rules = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=False),
    pre_tokenizers.ByteLevel(add_prefix_space=True),
])
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = rules, decoders.ByteLevel()
lines = [f"The year {year} is an example of the text, and the next is {year + 1}."
         for year in range(1900, 2030)]
trainer = trainers.BpeTrainer(
    vocab_size=600, special_tokens=["<end>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
tokenizer.train_from_iterator(lines, trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained("model")
Qwen2Config(vocab_size=tokenizer.get_vocab_size()).save_pretrained("model")
PYTHON

cat > read.py <<'PYTHON'
import json
import logging
import warnings

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

warned = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    auto = AutoTokenizer.from_pretrained("model")
text = "the year 2024"
pieces = {
    "file": Tokenizer.from_file("model/tokenizer.json").encode(text).tokens,
    "AutoTokenizer": auto.tokenize(text),
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast.from_pretrained("model").tokenize(text),
    "warnings": [line for line in [*warned, *map(str, said)] if "oken" in line],
}
print(json.dumps(pieces, ensure_ascii=False))
PYTHON

4.57.6/bin/python write.py 2> /dev/null
for version in 4.57.6 5.23.0; do
    "$version/bin/python" read.py 2> /dev/null > "$version.json"
    echo "$version $(cat "$version.json")"
done

python3 - <<'PYTHON'
import json

old, new = (json.load(open(f"{version}.json")) for version in ("4.57.6", "5.23.0"))
assert old["AutoTokenizer"] == old["file"], "4.x does not follow the file"
assert new["AutoTokenizer"] != new["file"], "5.x follows the file"
assert new["PreTrainedTokenizerFast"] == new["file"] == old["file"]
assert not new["warnings"], "5.x says something about it"
print("the same folder, other pieces in version 5, and not a word about it")
PYTHON
