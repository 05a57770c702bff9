"""How gradients are written for the network: a codec turns numbers into bytes and back."""

from shoal.sync.codec.cast import Bf16, Codec, Fp16

CODECS: dict[str, type[Codec]] = {"bf16": Bf16, "fp16": Fp16}
