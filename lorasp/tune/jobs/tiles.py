"""What the jobs of single kernels have in common: the architecture's own tiles are the base that others must beat."""

from collections.abc import Sequence
from dataclasses import fields
from typing import ClassVar

from lorasp.triton_kernels.plan_table import TILE_SECTIONS
from lorasp.triton_kernels.tuning import Target, Tiles
from lorasp.tune.jobs.dtype import NamedDtype


class TileJob(NamedDtype):
    """A dataclass of the fields of its operator's TILE_SECTIONS, and of sizes beside them, derives from this."""

    operator: ClassVar[str]
    base: ClassVar[str] = "own tiles"
    safe: ClassVar[Tiles] = Tiles()
    names: ClassVar[Sequence[str]] = ("own tiles", "tiles")
    heads: ClassVar[Sequence[str]] = ("shared KiB", "accumulators")

    @property
    def section(self) -> str:
        return self.operator

    def own_config(self, target: Target):
        """The architecture's own tiles."""
        raise NotImplementedError

    def other_configs(self, target: Target) -> list:
        """The other tiles that are worth timing."""
        raise NotImplementedError

    def use_of(self, target: Target, config) -> tuple[int, int]:
        """Bytes of shared memory, and registers of a thread that hold accumulators: bounds from below."""
        raise NotImplementedError

    def candidates(self, target: Target, plans: Sequence[str] = ()) -> list[Tiles]:
        """What the search tries, the architecture's own tiles first."""
        names = TILE_SECTIONS[self.operator].tiles
        others = [
            Tiles(tuple((name, getattr(config, name)) for name in names)) for config in self.other_configs(target)
        ]
        return [self.safe, *others]

    def footprint(self, target: Target, tiles: Tiles) -> list[str]:
        if tiles.own:
            config = self.own_config(target)
        else:
            (config,) = (
                config
                for config in self.other_configs(target)
                if all(getattr(config, name) == value for name, value in tiles.fields)
            )
        shared, accumulators = self.use_of(target, config)
        return [f"{shared / 1024:.0f}", str(accumulators)]

    def row(self, tiles: Tiles) -> dict:
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"dtype": self.dtype_name}
        row = {name: values[name] for name in TILE_SECTIONS[self.operator].key}
        return row if tiles.own else row | {"tiles": dict(tiles.fields)}
