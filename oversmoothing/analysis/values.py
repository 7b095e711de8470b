"""Statistics of one quantity in one layer; their size does not grow with the number of images."""

from dataclasses import dataclass

from torch import Tensor


class RunningMean:
    """Mean and standard deviation over the images seen so far; its size does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._sum_of_squares: Tensor | float = 0.0

    def update(self, values: Tensor) -> None:
        """Adds values of shape (B, ...), one per image. They stay on their device, without synchronisation."""
        values = values.detach().double()
        self.count += len(values)
        self._sum = self._sum + values.sum(dim=0)
        self._sum_of_squares = self._sum_of_squares + values.square().sum(dim=0)

    @property
    def mean(self) -> Tensor:
        """Shape (...), float64."""
        return self._sum / self.count

    @property
    def std(self) -> Tensor:
        """Shape (...), float64: population standard deviation over the images, not the error of the mean."""
        return (self._sum_of_squares / self.count - self.mean.square()).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Values:
    """A quantity in one layer: mean and standard deviation over ``count`` images (Swin's maps: windows)."""

    mean: Tensor  # (), (num_heads,), (bins,), (channels,) or (num_heads, bins); for profiles also (rows, columns)
    std: Tensor | None = None  # parameters have none
    count: int | None = None
    frequencies: list[float] | None = None  # of the bins, in units of pi rad per token or patch
    is_profile: bool = False  # the last axis is neither heads, channels nor frequencies, for example token positions

    @property
    def is_table_entry(self) -> bool:
        """Whether an average over its axes is meaningful."""
        return self.frequencies is None and not self.is_profile
