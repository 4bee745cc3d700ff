"""What FE2E's transformer and FiffDepth's U-Net share: one step from an image's latent to its geometry's latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn
from typing_extensions import Self

from densegeo.models.prompt import Prompt
from densegeo.size import Size

Config = TypeVar("Config")


class Denoiser(nn.Module, Generic[Config]):
    """latent (N, C, h, w), scaled -> the network's output, float32; `outputs.Decode` says how that is read.

    The name is the field's: these networks were trained to denoise. `bind` fixes prompt and image size.
    """

    BLOCKS: ClassVar[tuple[str, ...]] = ()  # lists of modules that may stay in their file until they run
    INPUTS: ClassVar[tuple[str, ...]]  # what `bind` makes of the prompt and the timestep; in no weight file

    config: Config
    prompt_embeds: Tensor
    guidance: float | None = None  # weight of classifier-free guidance

    @abstractmethod
    def bind(self, prompt: Prompt, size: Size, timestep: float) -> Self:
        """Fix the prompt, the image size and the timestep, as the sinusoids see it; returns self."""

    @property
    @abstractmethod
    def prompt_features(self) -> int:
        """Features of a prompt's token."""

    @abstractmethod
    def resize(self, size: Size) -> None:
        """Move a bound, perhaps rewritten network to another image size."""

    @abstractmethod
    def live_features(self, size: Size) -> int:
        """About how many numbers live at once in the widest block, for an image of this size."""

    @abstractmethod
    def summary(self) -> str:
        """The architecture in a line."""

    @classmethod
    def is_block(cls, key: str) -> bool:
        """Whether a tensor or module of this name belongs to one of the `blocks`."""
        return key.startswith(tuple(f"{kind}." for kind in cls.BLOCKS))

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """("double_blocks.0", module), ... in the order in which they run."""
        for kind in self.BLOCKS:
            for index, block in enumerate(getattr(self, kind)):
                yield f"{kind}.{index}", block

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The blocks, then the whole under the name "": for what is done to each linear where it lies."""
        yield from self.blocks()
        yield "", self

    @classmethod
    def quantizable(cls, linear: str) -> bool:
        """Whether a linear may become 8-bit: first and last layers keep their precision."""
        return cls.is_block(linear)


AnyDenoiser = Denoiser[Any]


def elements(module: nn.Module) -> int:
    """How many numbers a module's weight file holds."""
    return sum(tensor.numel() for tensor in module.state_dict().values())
