"""A device that `lorasp tune` can be driven on without one."""

from dataclasses import replace

from lorasp import cli
from lorasp.triton_kernels import tuning

TARGET = replace(tuning.target_of_arch(90), name="Test GPU 7")
PROVENANCE = {"device": "Test GPU 7", "torch": "2.13", "triton": "3.9", "commit": "abc", "kernels": "123"}


class InventedBench:
    """Choices cost what `prices` says (by default 1.2 of the base, whose own ratios vary by `spread`)."""

    def __init__(self, prices=(), spread=0.02, refused=(), hours=0.0):
        self.target = TARGET
        self.prices, self.spread, self.refused, self.hours = dict(prices), spread, dict(refused), hours
        self.prepared, self.verified, self.timed, self.clock = [], [], [], 0.0

    def prepare(self, job, choices):
        self.prepared += [(job, choice) for choice in choices]
        if refusal := self.refused.get((job, "prepare")):
            raise refusal

    def verify(self, job, plan):
        assert (job, plan) in self.prepared or job not in {known for known, _ in self.prepared}
        self.verified.append((job, plan))
        self.clock += self.hours
        if refusal := self.refused.get((job, plan), self.refused.get(plan)):
            raise refusal

    def samples(self, job, plans, rounds, seconds):
        for plan in plans:
            assert plan is None or (job, plan) in self.verified, "timed before it was checked"
        self.timed += [(job, plan) for plan in plans if plan]
        if refusal := self.refused.get((job, "samples")):
            raise refusal
        spread = [1 - self.spread / 2, 1.0, 1 + self.spread / 2, 1 - self.spread / 2, 1 + self.spread / 2]
        prices = [1.0 if plan is None else self.prices.get(plan, 1.2) for plan in plans]
        return [[(1e-3 * price, price * one) for one in spread[: rounds or 5]] for price in prices]


def options_of(*arguments):
    return cli.parser().parse_args(["tune", *map(str, arguments)])
