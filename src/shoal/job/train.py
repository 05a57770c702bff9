"""How long, in which batches and in which precision."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least, one_of, require


@dataclass(frozen=True)
class TrainOptions:
    """Length, batch, precision, validation."""

    steps: int = 0
    """Optimizer updates; 0 = as many as fit into `minutes`: estimated at the start, decided by the run's own
    pace as soon as the learning rate depends on it (wsd: where the decay begins), written into job.toml; with
    data.grow no end."""
    minutes: float = 3.5
    """With steps = 0: the length of the run in minutes, from the command to the end, validation included;
    saving and exporting a large model takes longer than the 8 seconds that are kept for it."""
    global_batch: int = 32
    """Sequences per step over all ranks; divisible by replicas × fsdp."""
    seed: int = 0
    """Seed of weights and data order, a whole number from 0. The layout does not change either."""
    precision: str = "auto"
    """`fp32`; `bf16` (matrix products in bf16, master weights, sums and optimizer in fp32); `fp64` (to
    compare layouts); `auto` = the fastest of fp32 and bf16, measured at the start."""
    compile: str = "auto"
    """torch.compile of each block: `on`, `off`, `auto` = where the measured gain repays the compilation."""
    dropout: float = 0.0
    """Share of the features dropped from the embedding and from what attention and feed-forward add to the residual
    stream, in training. Which ones depends on seed, step, sample and place only, not on the layout."""
    attention_dropout: float = 0.0
    """Share of attention's probabilities dropped in training; which ones, as for `dropout`. No fused attention kernel
    is used then: the probabilities of a layer exist, sequences × heads × sequence_length² of them. Not with
    `context`."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time; 0 = by size, in tiles of about 16 MiB."""
    validate_every: int = 0
    """Steps between validations; 0 = about ten times a run, of one without an end every 100. There is always one at
    the end of a run that comes to it."""
    validate_tokens: int = 0
    """Tokens per validation; 0 = all held-out text at the end, and up to 16,384 during training."""
    on_nonfinite: str = "stop"
    """NaN or inf in loss or gradient: the update is not applied; `stop` ends the run, `skip` goes on."""

    def validate(self) -> None:
        for name in ("steps", "minutes", "seed", "loss_chunk", "validate_every", "validate_tokens"):
            at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("dropout", "attention_dropout"):
            rate = getattr(self, name)
            require(0 <= rate < 1, f"train.{name}={rate} is not in [0, 1)", "e.g. 0.1")
        at_least("train.global_batch", self.global_batch, 1)
        one_of("train.precision", self.precision, ("auto", "fp32", "bf16", "fp64"))
        one_of("train.compile", self.compile, ("auto", "on", "off"))
        one_of("train.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        require(self.steps > 0 or self.minutes > 0, "the run has no length", "give train.steps or train.minutes")
