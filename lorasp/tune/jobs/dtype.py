"""What every job has: a dtype, named as plan tables name it."""

import torch


class NamedDtype:
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")
