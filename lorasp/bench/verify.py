"""The check that comes before anything of an operator is timed: lorasp.testing's, as an error."""

import types

import torch


def verify_case(operator: types.ModuleType, case: object, device: torch.device) -> None:
    """Raise AssertionError where what runs by itself on `device` is further off than lorasp.testing allows.

    operator: a module of lorasp.testing; case: one of its cases.
    """
    for result in operator.check_case(case, "auto", "auto", device):
        if not result.ok:
            raise AssertionError(
                f"{result.op} {result.tensor} [{result.case}]: error {result.error:.3e} exceeds {result.bound:.3e}"
            )
