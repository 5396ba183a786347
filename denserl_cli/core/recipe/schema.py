# Long: the whole of a recipe on one page, as its reference in docs/recipes.md is made from it.
"""What a recipe may say: frozen dataclasses whose field docstrings are the documentation.

One recipe is one experiment: a backbone, a granularity and all stages. Values are checked for type
by `building.py` and for sense by `checks.py`; the loader reports everything they find at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from denserl_cli.core.recipe.functions import short_name

Granularity = Literal["segment", "token", "bandit"]
Interpolation = Literal["even", "repeat", "end"]
Aggregate = Literal["mean", "sum", "last"]
NormalizerKind = Literal["location", "global", "last", "none"]
AdvantageName = Literal["gae", "group", "rloo", "reinforce++"]
SegmentTotal = Literal["sum", "mean", "softmin"]
Cut = Literal["entropy", "quantile", "sentence", "newline", "fixed", "random"]


SOURCES = {
    "values": "reward model",
    "differences": "reward model",
    "attention": "reward model",
    "score": "reward model",
    "shapley": "reward model",
    "log_ratio": "policy",
}
"""The sources of rewards that are built in, and the kind of model that each reads."""


DataFormat = Literal[
    "hh-rlhf",
    "shared-beginning",
    "ultrafeedback",
    "helpsteer2",
    "helpsteer3",
    "nectar",
    "shp",
    "webgpt",
    "arena-human",
    "judgebench",
    "rm-bench",
    "reward-bench-2",
    "alpaca-farm",
    "sharegpt-dpo",
    "orca-dpo",
    "pku-saferlhf",
    "oasst",
    "prm800k",
    "kto",
]
BetterValues = Literal["name", "index-from-0", "index-from-1", "sign"]
Pairing = Literal["best-worst", "all", "product", "ranking"]


@dataclass(frozen=True)
class Columns:
    """Where a row keeps its prompt, its answers and which of them is better.

    A column's name, or a path into it: `question.text`, `turns[0]`, `answers[*].text` for all.
    """

    prompt: str | tuple[str, ...] | None = None
    """The question or the conversation; several are joined in their order."""
    system: str | None = None
    """The system message."""
    chosen: str | None = None
    """The better answer, or several with `[*]`."""
    rejected: str | None = None
    """The worse answer, or several with `[*]`."""
    answers: str | tuple[str, ...] | None = None
    """All answers, in place of chosen and rejected: one path each, or one path with `[*]`."""
    better: str | None = None
    """Which of the answers is the better one; how it says so: `better_values`."""
    better_values: BetterValues | dict[str, Any] | None = None
    """name (A>B, model_a, tie), index-from-0, index-from-1, sign, or a mapping; null: name."""
    scores: str | tuple[str, ...] | None = None
    """A score for each answer, higher is better."""
    rank: str | tuple[str, ...] | None = None
    """A rank for each answer, lower is better."""
    margin: str | None = None
    """By how much the better answer is better; its absolute value where `better` is the same."""
    completions: str | None = None
    """The steps of one answer, each with a label of its own, in place of answers to compare."""
    labels: str | None = None
    """For each of the steps: true or 1 where it is right, false or 0, or a share in between."""


@dataclass(frozen=True)
class MessageKeys:
    """What the parts of a message are called."""

    role: str = "role"
    """Who speaks."""
    content: str = "content"
    """What is said."""


@dataclass(frozen=True)
class Source:
    """One source of data, a part of a mixture."""

    path: str
    """Hub name, a file, several as `part-*.jsonl`, a folder, or `-` for standard input."""
    split: str | None = None
    """Split to read; null: `train` where the source has splits."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    max_samples: int | None = None
    """Use at most this many rows, drawn with the recipe's seed."""
    weight: float = 1.0
    """Passes over this source in one epoch: 0.5 draws half of its rows, 2 shows each row twice."""
    format: DataFormat | None = None
    """Known layout of the rows; null: `prompt`, `chosen`, `rejected` and `messages`."""
    columns: Columns | None = None
    """Where the rows keep what is needed; replaces those of `format`, one by one."""
    roles: dict[str, Any] = field(default_factory=dict)
    """What further roles and speakers mean: each is system, user or assistant."""
    message_keys: MessageKeys | None = None
    """Keys of a message; null: role and content, or from and value."""
    pairs: Pairing | None = None
    """Of a row's answers; null: best-worst, or product of lists. ranking: all of them at once."""
    ties: Literal["skip", "keep-as-half"] = "skip"
    """Equally good answers: left out, or one pair in each order, a label of one half."""
    group_by: str | None = None
    """Rows with one answer each: those with the same value here are compared."""


@dataclass(frozen=True)
class SandboxConfig:
    """A controlled task with a known true reward, made in-process: no download, no GPU."""

    phrases: int = 8
    """Number of different phrases: a first word that is a choice, then words that follow it."""
    phrase_length: int = 4
    """Words in a phrase."""
    endings: int = 1
    """Words a phrase may end with, shared by all; above 1, no word is worth anything alone."""
    response_phrases: int = 24
    """Least number of phrases in a response."""
    pairs: int = 4000
    """Preference pairs to write, labelled by noisy Bradley-Terry on the true reward."""
    label_temperature: float = 0.15
    """Noise of the preference labels: true-reward difference at which an odds of e is given."""
    hidden_size: int = 64
    """Width of the model."""
    heads: int | None = None
    """Attention heads; null: one for each 16 of the width."""
    layers: int = 2
    """Depth of the model."""
    fit_steps: int = 300
    """Language-model steps on the sandbox's own text before anything else."""


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: starting policy, frozen reference, and body of reward model and critic."""

    path: str = ""
    """Hub name or folder of a causal language model; empty with a `sandbox` block."""
    revision: str | None = None
    """Hub revision."""
    tokenizer: str | None = None
    """Hub name or folder of the tokenizer; null: the model's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; trained weights stay float32. auto: bfloat16 where that is faster."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention kernel. auto: FlashAttention 2 where installed and usable, SDPA, or eager."""
    cudnn_attention: bool = False
    """Let SDPA on a GPU use cuDNN's kernels, which are planned anew for every new length."""
    packing: bool | None = None
    """Score pairs without padding, their prompt read once; null: on CPUs and FlashAttention 2."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more compute."""


@dataclass(frozen=True)
class ChatConfig:
    """How conversations become tokens. The tokenizer's own chat template decides the rest."""

    terminator: str | None = None
    """Token that ends an assistant turn; null: derived from the template."""
    stop_tokens: tuple[str, ...] = ()
    """Further tokens that end a sampled response, beside the terminator."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template, e.g. `date_string` or `enable_thinking`."""
    prompt_ending: str | None = None
    """Text that every rendered prompt must end with; checked at load, null: not checked."""


@dataclass(frozen=True)
class SegmentationConfig:
    """Where one reward ends and the next begins (method §2)."""

    granularity: Granularity = "segment"
    """segment: cut where the reference is surprised; token: every token; bandit: one score."""
    cutoff: float | Literal["auto"] | None = None
    """Entropy in nats above which a token ends a segment, for `segment` alone; auto: calibrated."""
    segment_length: float | None = None
    """Mean tokens of a segment, for `cutoff: auto`, `cut: fixed` and `cut: random`; null: 8."""
    cut: Cut = "entropy"
    """entropy: the method, by `cutoff`; the other rules are described in docs/cuts.md."""
    quantile: float | None = None
    """Share of a response's tokens that `cut: quantile` does not cut after, between 0 and 1."""
    cut_seed: int | None = None
    """Seed of `cut: random`, beside the response itself; null: 42."""

    @property
    def by_entropy(self) -> bool:
        """Whether segments depend on the reference model."""
        return self.granularity == "segment" and self.cut in ("entropy", "quantile")

    def deciding(self) -> dict[str, Any]:
        """What decides where segments end, by field; null where a field plays no part."""
        fields = ("granularity", "cutoff", "cut", "quantile", "segment_length", "cut_seed")
        values = {name: getattr(self, name) for name in fields}
        if self.cut not in ("fixed", "random"):
            values["segment_length"] = None
        return values


@dataclass(frozen=True)
class DataConfig:
    """Preference pairs and prompts."""

    preferences: tuple[Source, ...] = ()
    """Preference pairs, or answers in labelled steps, for train-rm and fit-function."""
    evaluation: tuple[Source, ...] = ()
    """The same for evaluation; empty: `eval_pairs` are held out of `preferences`."""
    eval_pairs: int = 2000
    """Pairs held out for evaluation (at most a tenth of the data) when `evaluation` is empty."""
    prompts: tuple[Source, ...] = ()
    """Sources of prompts for train-ppo: rows with `prompt`, `messages` or `chosen`."""
    eval_prompts: int = 64
    """Prompts held out of `prompts` for evaluation during train-ppo (at most a tenth)."""
    max_length: int = 2048
    """Tokens of prompt + response in reward-model data."""
    max_prompt_length: int = 1728
    """Tokens the prompt keeps (its last ones) when prompt + response exceed `max_length`."""
    strict: bool = False
    """Stop when a row is unusable, instead of skipping and counting it."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule, for every trained model."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    min_lr_ratio: float = 0.1
    """The cosine schedule ends at this share of the learning rate."""


@dataclass(frozen=True)
class EngineConfig:
    """What holds the trained models of a stage, and how they are spread over processes."""

    kind: Literal["auto", "torch", "deepspeed"] = "auto"
    """auto: plain torch in one process, DeepSpeed in several or where a GPU offloads something."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards over processes: 1 optimizer, 2 and gradients, 3 and weights."""
    offload_optimizer: bool = False
    """Keep Adam's state and the master weights in the CPU's memory."""
    offload_parameters: bool = False
    """Keep sharded weights in the CPU's memory between their uses; zero_stage 3 alone."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients accumulate."""
    shard_frozen: bool | None = None
    """Shard reference and reward model like the trained models; null: with zero_stage 3."""
    offload_frozen: bool = False
    """Keep reference and reward model in the CPU's memory but while they score; train-ppo alone."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed settings of your own, laid over what the fields above make."""


@dataclass(frozen=True)
class RewardModelConfig:
    """Training of the segment reward model (method §3)."""

    epochs: float = 1.0
    """Passes over the preference pairs."""
    batch_size: int = 128
    """Pairs per optimizer step, over all ranks."""
    micro_batch_size: int = 8
    """Pairs per backward pass on one device; their sides go forward in parts that spare padding."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    aggregate: Aggregate = "mean"
    """How segment rewards become the sequence score of the Bradley-Terry loss."""
    margins: Literal["target", "weight", "ignore"] = "target"
    """A pair's margin: how much higher its chosen score should be, its weight, or nothing."""
    temperature: float = 1.0
    """Divides the differences of scores in the loss: 1 / beta of Q-RM and SimPO."""
    target_margin: float = 0.0
    """By how much every difference has to exceed 0: gamma of Q-RM and SimPO."""
    label_smoothing: float = 0.0
    """Share of the preferences taken to be the wrong way round, below one half."""
    center_rewards: float = 0.0
    """Weight of the squared sum of a pair's scores in the loss, which keeps their mean near 0."""
    eval_every: int = 512
    """Optimizer steps between evaluations; the last step always evaluates."""
    save_every: int = 256
    """Optimizer steps between checkpoints."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What trains the reward model."""


@dataclass(frozen=True)
class NormalizerConfig:
    """The normaliser functions of method §4."""

    kind: NormalizerKind | None = None
    """location, global, last or none; null: `location`, with bandit `global`."""
    pairs: int = 60000
    """Preference pairs to score for the fit, drawn from all of them (both sides are used)."""
    batch_size: int = 8
    """Pairs per forward pass."""
    seed: int = 42
    """Seed that draws the pairs."""
    min_std: float | None = None
    """Floor of std(p); null: a tenth of b_std."""


@dataclass(frozen=True)
class RewardSource:
    """One of the rewards that PPO adds up; a text alone is short for its `source`."""

    source: str
    """values, differences, attention, score, shapley, log_ratio, or a reward function."""
    weight: float = 1.0
    """Factor of its rewards; 0 records it and trains on the others."""
    model: str | None = None
    """Hub name or folder of a model of its own; null: the run's reward model."""
    revision: str | None = None
    """Hub revision of `model`."""
    name: str | None = None
    """What metrics call it; null: the source, or the last part of the function's name."""
    scale: float | None = None
    """Factor of log_ratio's differences of log-probabilities; null: 0.05."""
    clip: float | None = None
    """log_ratio is clamped to ± this after `scale`; null: 0.05."""
    permutations: int | None = None
    """Orders that shapley draws for a response of more than 6 segments; null: 8."""

    @property
    def built_in(self) -> bool:
        """Whether it is one of denserl's own sources, not a function."""
        return self.source in SOURCES

    @property
    def reads_reward_model(self) -> bool:
        """Whether it needs the run's own, or its published, reward model."""
        return SOURCES.get(self.source) == "reward model" and self.model is None

    @property
    def key(self) -> str:
        """Whose numbers it reads: its own model's; empty for the run's reward model."""
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.model}{at}" if self.model else ""

    @property
    def metric(self) -> str:
        """The metric of its rewards before their weight."""
        return "rm_score" if self.reads_reward_model else f"reward_{self.label}"

    @property
    def label(self) -> str:
        """What metrics call it."""
        return self.name or short_name(self.source)


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled, for train-ppo and evaluate policy (docs/rollouts.md)."""

    engine: Literal["torch", "vllm"] = "torch"
    """What samples: torch, the model itself in this process; vllm, beside it or on a server."""
    server: str | None = None
    """Address of a vLLM server that runs, http://…; null: `engine: vllm` starts one a process."""
    memory_share: float = 0.4
    """Share of the device's memory that a vLLM started here may take while it samples."""
    rows: int | None = None
    """Responses that one process samples side by side; null: as many as memory allows."""
    batch_size: int = 1024
    """Prompts per iteration, over all ranks."""
    samples_per_prompt: int = 1
    """Responses sampled for each prompt."""
    micro_batch_size: int = 16
    """Responses scored together on one device."""
    max_new_tokens: int = 1024
    """Longest response that is sampled."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are taken at the same."""
    top_p: float = 1.0
    """Nucleus sampling; below 1, what is left out is corrected by `importance`."""
    importance: Literal["none", "token", "sequence"] | None = None
    """Weights π / μ of the policy loss, μ the sampler's; null: token with vllm or top_p < 1."""
    importance_cap: float = 2.0
    """Largest of these weights."""
    old_logprobs: Literal["auto", "sampled", "recomputed"] = "auto"
    """Old log-probabilities: the sampler's, or one more pass; auto: the sampler's where equal."""

    @property
    def correction(self) -> Literal["none", "token", "sequence"]:
        """The value of `importance`, also where the recipe leaves it open."""
        if self.importance is not None:
            return self.importance
        return "token" if self.engine == "vllm" or self.top_p < 1 else "none"


@dataclass(frozen=True)
class PPOConfig:
    """PPO with dense rewards (method §5)."""

    passes: float = 1.0
    """Passes over the prompts; ignored where `iterations` is set."""
    iterations: int | None = None
    """Rollout + update rounds; null: as many as `passes` over the prompts take."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled."""
    train_batch_size: int = 128
    """Responses per optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Responses per training forward pass on one device, at most: fewer spares padding."""
    epochs: int = 1
    """Passes over each rollout batch."""
    max_prompt_length: int = 1024
    """Prompt tokens kept (the last ones)."""
    actor_learning_rate: float = 5e-7
    """Peak learning rate of the policy."""
    critic_learning_rate: float = 9e-6
    """Peak learning rate of the critic."""
    critic_init: str = "policy"
    """Where the critic starts: policy (with a fresh head), reward_model, or a critic's folder."""
    critic_warmup: int = 0
    """First iterations in which the critic alone learns."""
    critic_warmup_rollouts: int | None = None
    """Rollouts that `critic_warmup` samples and then goes over again; null: a new one each time."""
    save_critic: bool = False
    """Save the critic as well, in the run folder's `critic`: another run's `critic_init`."""
    action: Literal["token", "segment"] = "token"
    """What one action is: a token, or a segment as a macro action (docs/advantages.md)."""
    advantage: AdvantageName = "gae"
    """gae: by a critic; group, rloo: by the other samples of a prompt; reinforce++: by neither."""
    baseline: Literal["response", "token"] = "response"
    """What group and rloo compare with: the mean return of a response, or reward of a token."""
    divide_by_std: bool = True
    """group: divide by the std of a prompt's returns (GRPO), or do not (Dr. GRPO)."""
    gamma: float = 1.0
    """Discount per action."""
    lam: float | Literal["adaptive"] = 0.95
    """GAE's lambda; adaptive: 1 - 1 / (lam_alpha · actions of the response)."""
    lam_alpha: float = 0.05
    """Share of a response over which `lam: adaptive` lets errors reach back."""
    lam_value: float | None = None
    """Lambda of the critic's targets; null: as `lam`."""
    policy_clip: float = 0.2
    """Clip range of the probability ratio."""
    policy_clip_high: float | None = None
    """Clip range of the ratio above 1; null: as `policy_clip`."""
    dual_clip: float | None = None
    """Bound, above 1, of the ratio of tokens with a negative advantage; null: none."""
    value_clip: float | Literal["none"] | None = None
    """Clip range of the value update, or none; null: 0.25, with bandit 0.2."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, in nats a token, as a bonus in its loss."""
    loss_reduce: Literal["sequence", "token", "constant"] = "sequence"
    """Mean of the rows' token means, of all tokens, or of the rows' sums / max_new_tokens."""
    rewards: tuple[RewardSource, ...] = (RewardSource("values"),)
    """Where rewards come from; they add up (docs/dense-rewards.md, docs/rewards.md)."""
    interpolation: Interpolation | None = None
    """How a segment's reward reaches its tokens; null: `even`, with bandit `end`."""
    segment_total: SegmentTotal = "sum"
    """A response's total: sum of its segments' rewards (published), their mean, or a soft least."""
    softmin_temperature: float = 0.1
    """Of `segment_total: softmin`: towards 0 the least segment counts alone, far above 0 all do."""
    length_normalize: bool = False
    """Divide each token's reward by the response length."""
    reward_clip: float = 10.0
    """Token rewards are clamped to ± this before the KL penalty."""
    missing_eos_penalty: float | None = None
    """Reward, on every token, of a response without terminator instead of its RM rewards."""
    max_response_tokens: int | None = None
    """A response longer than this gets `overlong_penalty`."""
    overlong_penalty: float | None = None
    """Reward, on every token, of an over-long response instead of its RM rewards."""
    kl_coef: float = 0.01
    """Weight of the per-token KL penalty against the reference; the start value if adaptive."""
    kl_loss: Literal["k2", "k3"] | None = None
    """Estimate of the KL that the policy's loss adds; null: k1, taken off the rewards."""
    kl_target: float | None = None
    """Mean per-token KL that an adaptive controller steers to; null: `kl_coef` is fixed."""
    kl_horizon: int = 10000
    """Horizon of the adaptive controller, in responses."""
    kl_limit: float | None = None
    """Stop when the mean KL of a response (nats, summed over its tokens) exceeds this."""
    eval_samples: int = 1
    """Responses sampled for each held-out prompt in an evaluation."""
    eval_every: int = 10
    """Iterations between evaluations on held-out prompts; the last iteration always evaluates."""
    save_every: int = 5
    """Iterations between checkpoints."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What trains policy and critic."""

    @property
    def has_critic(self) -> bool:
        """Whether the advantages need a critic."""
        return self.advantage == "gae"

    @property
    def uses_reward_model(self) -> bool:
        """Whether the run's own, or its published, reward model scores."""
        return any(one.reads_reward_model for one in self.rewards)

    @property
    def uses_normalizer(self) -> bool:
        """Whether rewards are normalised, as the values of that reward model alone are."""
        return any(one.source == "values" and one.model is None for one in self.rewards)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters for reward model, policy and critic instead of training all weights.

    The reference is the policy with its adapters off; heads are always trained whole.
    """

    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """Scale of the adapters: they add alpha / rank times their product."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: every linear layer of the body."""
    quantize: bool = False
    """Hold the frozen weights in 4 bits (QLoRA); needs a GPU and bitsandbytes."""


@dataclass(frozen=True)
class Coefficients:
    """A normaliser: mean(p) = w_mean log p + b_mean, std(p) = w_std log p + b_std (method §4)."""

    b_mean: float
    """Mean reward at the end of a response."""
    b_std: float
    """Standard deviation of the reward at the end of a response."""
    w_mean: float = 0.0
    """Slope of the mean; 0 with bandit."""
    w_std: float = 0.0
    """Slope of the standard deviation; 0 with bandit."""


@dataclass(frozen=True)
class PublishedConfig:
    """A reward model made elsewhere and the normaliser that goes with it.

    train-ppo uses the two, together, in a run that has trained no reward model of its own.
    """

    reward_model: str
    """Hub name or folder of a sequence-classification model with one label."""
    granularity: Granularity
    """Granularity that it was trained for; the recipe's own must be the same."""
    revision: str | None = None
    """Hub revision of the reward model."""
    cutoff: float | None = None
    """Cutoff that it was trained with."""
    normalizer: Coefficients | None = None
    """Its normaliser; null: `denserl fit-function` makes one for it."""
    policy: str | None = None
    """Hub name or folder of the policy that was trained with the two."""


@dataclass(frozen=True)
class RecordedConfig:
    """Facts about model, data and published training, written down so that plans need no network.

    Nothing is trained by them. What replaces `model.path` or data by `extends`, `--set` or `--data`
    drops the facts about it.
    """

    gpus: int | None = None
    """GPUs of the published training."""
    gated: bool = False
    """Whether the hub asks to accept a licence before the model can be downloaded."""
    parameters: int | None = None
    """Weights of the model."""
    hidden_size: int | None = None
    """Width of the model."""
    intermediate_size: int | None = None
    """Width of its feed-forward layers."""
    layers: int | None = None
    """Depth of the model."""
    heads: int | None = None
    """Attention heads."""
    key_value_heads: int | None = None
    """Heads of keys and values."""
    vocabulary: int | None = None
    """Rows of the embedding."""
    preference_pairs: int | None = None
    """Rows of `data.preferences`."""
    prompts: int | None = None
    """Rows of `data.prompts`."""


@dataclass(frozen=True)
class RunConfig:
    """Book-keeping of a run folder."""

    keep_checkpoints: int = 2
    """Newest full checkpoints kept for each stage."""
    keep_gigabytes: float | None = None
    """Size that a stage's checkpoints may have together; the newest is kept in any case."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss, gradient or reward that is NaN or infinite: stop, or leave the update out."""
    log_samples: int = 4
    """Samples of an iteration in samples.jsonl; 0: none, and no pair of train-rm either."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where the metrics of metrics.jsonl go as well; extras of the same names install them."""
    wandb_project: str = "denserl"
    """Project in W&B (WANDB_PROJECT goes before it), MLflow experiment, trackio project."""


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    name: str
    """Name of the recipe; the run folder is `runs/<name>` unless `--out` says otherwise."""
    description: str = ""
    """One line shown by `denserl recipes list`."""
    seed: int = 42
    """Seed of everything random that has no seed of its own."""
    sandbox: SandboxConfig | None = None
    """Present: model, tokenizer and data are the embedded controlled task's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    """Present: adapters are trained instead of all weights."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    normalizer: NormalizerConfig = field(default_factory=NormalizerConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    run: RunConfig = field(default_factory=RunConfig)
    published: PublishedConfig | None = None
    """Present: a reward model and normaliser to start train-ppo from."""
    recorded: RecordedConfig | None = None
    """Present: what --dry-run and `recipes list` say about sizes and hardware."""


CUT_FIELDS: dict[Cut, tuple[str, ...]] = {
    "entropy": ("cutoff", "segment_length"),
    "quantile": ("quantile",),
    "sentence": (),
    "newline": (),
    "fixed": ("segment_length",),
    "random": ("segment_length", "cut_seed"),
}
"""The fields of `segmentation` that each cut reads."""

CRITIC_WORDS = ("policy", "reward_model")
"""What `ppo.critic_init` may be beside a folder."""
SOURCE_DEFAULTS: dict[str, dict[str, Any]] = {
    "log_ratio": {"scale": 0.05, "clip": 0.05},
    "shapley": {"permutations": 8},
}
"""The fields of a source of rewards that it alone reads, and their defaults."""
