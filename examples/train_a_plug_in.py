"""Stage one by hand: a plug-in around a frozen tokenizer, in a plain training loop.

    python examples/train_a_plug_in.py [STEPS]

`unicompress train stage-one` does the same with checkpoints, schedules and several processes.
"""

import sys

import torch

from unicompress import ImageCodec, ImageTokenizer
from unicompress.codec import CodecSpec
from unicompress.data.images import to_tensor
from unicompress.data.scenes import Scenes
from unicompress.tokenizers.toy import ToySingle


def batch(step: int, size: int, side: int) -> torch.Tensor:
    """Pictures that no other step has seen: the training split never runs out."""
    scenes = Scenes("train", size=side)
    return torch.stack([to_tensor(scenes[step * size + i].pixels) for i in range(size)])


def train(tokenizer: ImageTokenizer, spec: CodecSpec, steps: int) -> ImageCodec:
    """Eq. 8 with Adam; the tokenizer's weights do not move."""
    generator = torch.Generator().manual_seed(0)
    side = tokenizer.spec.image_size
    codec = ImageCodec(tokenizer.freeze(), spec)
    codec.calibrate(batch(10**6, 64, side), generator)  # or the globals start out all alike
    optimizer = torch.optim.AdamW(codec.parameters(), lr=2e-3)
    for step in range(steps):
        loss = codec.loss(batch(step, 8, side), generator=generator)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        codec.update_codebooks(loss, generator)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: L_reg {loss.regression:.4f}, L_cb {loss.codebook:.4f}")
    return codec.eval()


def main(steps: str = "100") -> None:
    torch.manual_seed(0)
    spec = CodecSpec(stride=2, global_count=4, width=64, depth=2)
    codec = train(ToySingle(rows=8, columns=8), spec, int(steps))
    pixels = batch(2 * 10**6, 8, 32)
    codes = codec.encode(pixels)
    error = (codec.decode(codes) - pixels).square().mean()
    print(f"{codes.shape[1]} codes instead of {codec.tokenizer.spec.grid.length}, MSE {error:.3f}")
    print(f"loss when globals change places: {codec.shuffled_global_gap(pixels):+.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
