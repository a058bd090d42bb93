"""Whether training steps are compiled by ``torch.compile``: the user's word, or what is faster on the user's device."""

from __future__ import annotations

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from monai_mamba.nnunet.guard import GradientGuard
from monai_mamba.nnunet.randomness import capture_random_state, restore_random_state

#: nnU-Net's own variable; ``measure`` is ours, nnU-Net reads it as false.
COMPILE_VARIABLE = "nnUNet_compile"

_SETTINGS: dict[str, Literal["on", "off", "measure"]] = {
    **dict.fromkeys(("true", "1", "t"), "on"),
    **dict.fromkeys(("", "false", "0", "f"), "off"),
    "measure": "measure",
}
_T = TypeVar("_T")


def compile_setting() -> Literal["on", "off", "measure"]:
    """Return what ``nnUNet_compile`` asks for; off where it is unset.

    Raises:
        ValueError: for a value that means nothing.
    """
    text = os.environ.get(COMPILE_VARIABLE, "")
    if text.lower() not in _SETTINGS:
        raise ValueError(
            f"`{COMPILE_VARIABLE}` must be true, 1 or t, false, 0 or f, or measure, got {text!r}; correct it "
            "or unset it"
        )
    return _SETTINGS[text.lower()]


def refusal_to_measure(device: torch.device, is_distributed: bool) -> str | None:
    """Return why compiling is not tried here, or None."""
    if is_distributed:
        return "not with several processes, where it has not been tried"
    if device.type not in ("cpu", "cuda"):
        return f"not on the device {device.type}, on cpu and cuda only"
    return None


def measuring_conditions(device: torch.device, patch_size: Sequence[int], batch_size: int) -> dict[str, Any]:
    """Return what a decision depends on, as plain values: one made under others is not taken over."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        found = re.search(r"model name\s*: (.*)", text)
        name = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    # A version of torch is a subclass of str, which weights_only=True does not read.
    return {
        "device": name,
        "torch": str(torch.__version__),
        "patch_size": [int(n) for n in patch_size],
        "batch_size": int(batch_size),
    }


@dataclass(frozen=True)
class Decision:
    """What stays for the rest of a training.

    Attributes:
        is_compiled: whether training steps are compiled.
        reason: for the log.
        plain_s, compiled_s: medians of a step in seconds, None if compiling failed.
        compile_s: seconds that compiling took, None if it failed.
    """

    is_compiled: bool
    reason: str
    plain_s: float | None = None
    compiled_s: float | None = None
    compile_s: float | None = None


class MeasuredCompilation:
    """Runs training steps, plain ones and compiled ones, and settles for what is faster.

    Plain steps for warming up come first. Then the network is compiled, unless too little of the training is left to
    win that time back, and plain and compiled steps take turns, so that what slows both (data loading that fills its
    queues, heat) is no reason for either. Compiled ones stay if the median of the ratios of the pairs is below
    `max_ratio` and they were the faster ones in `min_pairs_won` pairs; where there is no difference, 12 of 15 come
    about once in 57 trainings. Each step is one of the training, on a batch of its own.

    A compiled step that fails before the optimizer's step is taken back and repeated plain, and so are all that follow.

    Args:
        network: stays as it is; the compiled one is another object on the same parameters.
        optimizer, scaler, guard: of the training; `guard` must be counting while a step runs.
        device: where the network is.
        compile: makes the compiled network; nothing is compiled before its first call.
        conditions: see :func:`measuring_conditions`.
        log: takes one line.
        clock: seconds.

    Attributes:
        steps_left: training steps from now on; the caller sets it at the start of an epoch, each step counts it down.
        decision: None until there is one, and where too few steps are left.
        is_next_compiled: whether the next step is.
    """

    num_warmup = 10
    num_compiled_warmup = 3
    num_pairs = 15
    min_pairs_won = 12
    max_ratio = 0.97
    #: Compiling our networks took two to five minutes of one core and spared a step a few percent of its time at most
    #: (benchmarks/compile.py). That it takes a minute and spares half is out of reach: below that it cannot pay.
    least_compile_s = 60.0
    largest_saving = 0.5

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        guard: GradientGuard,
        device: torch.device,
        *,
        compile: Callable[[nn.Module], Any],
        conditions: dict[str, Any],
        log: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.steps_left = 0
        self.decision: Decision | None = None
        self.is_next_compiled = False
        self.clock = clock
        self._network = network
        self._optimizer = optimizer
        self._scaler = scaler
        self._guard = guard
        self._device = device
        self._compile = compile
        self._conditions = conditions
        self._log = log
        self._compiled: Any = None
        self._plan: Generator[bool, float, None] | None = None

    def state(self) -> dict[str, Any] | None:
        """Return the decision as plain values for a checkpoint; None if there is none."""
        return None if self.decision is None else {"conditions": self._conditions, **asdict(self.decision)}

    def resume(self, state: Any) -> None:
        """Take over the decision in the :meth:`state` of an earlier training; measure again if conditions changed."""
        names = {field.name for field in fields(Decision)}
        if not isinstance(state, dict) or state.keys() != {"conditions", *names}:
            return
        if changed := [name for name, value in self._conditions.items() if state["conditions"].get(name) != value]:
            self._say(f"decided for another {' and '.join(changed)} before; measuring again")
            return
        self.decision = Decision(**{name: state[name] for name in names})
        self._say(f"as decided before: {self.decision.reason}")

    def step(self, train: Callable[[Any], _T]) -> _T:
        """Run a training step with the network whose turn it is.

        Args:
            train: runs the step with a network; called a second time, with the plain one, if the compiled one fails.
        """
        if self._plan is None:
            self._make_plan()
        if self.is_next_compiled:
            before = _RestorePoint(self._network, self._optimizer, self._scaler)
            try:
                return self._timed(lambda: train(self._compiled_network()))
            except Exception as error:
                if self._guard.is_step_attempted:  # whatever failed, it was not the network
                    raise
                self._give_up(_cause(error))
            # Only now: the traceback held what the failed step had allocated.
            gc.collect()
            before.restore()
        return self._timed(lambda: train(self._network))

    def _timed(self, run: Callable[[], _T]) -> _T:
        self._wait()
        began = self.clock()
        result = run()
        self._wait()
        seconds = self.clock() - began
        self.steps_left -= 1
        assert self._plan is not None
        self.is_next_compiled = self._plan.send(seconds)
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _compiled_network(self) -> Any:
        if self._compiled is None:
            self._compiled = self._compile(self._network)
        return self._compiled

    def _give_up(self, cause: str) -> None:
        self._compiled = None
        reason = f"a compiled step failed ({cause}); it is repeated plain, and training stays plain"
        self.decision = Decision(False, reason)
        self._say(reason)
        self._make_plan()

    def _make_plan(self) -> None:
        self._plan = self._planned_steps()
        self.is_next_compiled = next(self._plan)

    def _planned_steps(self) -> Generator[bool, float, None]:
        """Say of each step whether it is compiled; take its seconds."""
        decision = self.decision
        if decision is None:
            decision = self.decision = yield from self._measure()
        elif decision.is_compiled and not self._pays_again(decision):
            decision = None
            self._say(f"{self.steps_left} steps are left, too few to compile again for; training stays plain")
        while True:
            yield decision is not None and decision.is_compiled

    def _pays_again(self, decision: Decision) -> bool:
        if decision.plain_s is None or decision.compiled_s is None or decision.compile_s is None:
            return False
        return self.steps_left * (decision.plain_s - decision.compiled_s) > decision.compile_s

    def _measure(self) -> Generator[bool, float, Decision | None]:
        if self.steps_left <= self.num_warmup + self.num_compiled_warmup + 2 * self.num_pairs:
            self._say(f"{self.steps_left} steps are left, fewer than measuring takes; training stays plain")
            return None
        warmup = []
        for _ in range(self.num_warmup):
            warmup.append((yield False))
        estimate = median(warmup[self.num_warmup // 2 :])
        if self.steps_left * estimate * self.largest_saving < self.least_compile_s:
            self._say(
                f"{self.steps_left} steps of {estimate:.3g} s are left, too few to win back the time of compiling; "
                "training stays plain"
            )
            return None
        first = []
        for _ in range(self.num_compiled_warmup):
            first.append((yield True))
        plain, compiled = [], []
        for _ in range(self.num_pairs):
            plain.append((yield False))
            compiled.append((yield True))
        decision = self._decide(first, plain, compiled)
        self._say(decision.reason)
        return decision

    def _decide(self, first: list[float], plain: list[float], compiled: list[float]) -> Decision:
        plain_s, compiled_s = median(plain), median(compiled)
        compile_s = max(0.0, sum(first) - len(first) * compiled_s)
        ratios = sorted(b / a for a, b in zip(plain, compiled, strict=True))
        ratio = median(ratios)
        num_won = sum(one < 1 for one in ratios)
        is_compiled = ratio < self.max_ratio and num_won >= self.min_pairs_won
        saved_s = plain_s * (1 - ratio)
        outcome = (
            f", which {compile_s / saved_s:.0f} steps win back, {self.steps_left} are left; "
            "training steps stay compiled"
            if is_compiled
            else "; training stays plain"
        )
        reason = (
            f"plain step {_spread(plain)} s, compiled {_spread(compiled)} s, ratio {ratio:.2f} ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}), the compiled one faster in {num_won} of {len(ratios)} pairs; compiling took "
            f"{compile_s:.0f} s{outcome}"
        )
        return Decision(is_compiled, reason, plain_s, compiled_s, compile_s)

    def _say(self, text: str) -> None:
        self._log(f"{COMPILE_VARIABLE}=measure: {text}")


class _RestorePoint:
    """What a training step changes before the optimizer's step, to take a failed one back."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        self._network = network
        self._optimizer = optimizer
        self._scaler = scaler
        self._random_state = capture_random_state()
        self._buffers = [buffer.clone() for buffer in network.buffers()]  # running statistics of batch norm

    def restore(self) -> None:
        """Take the step back."""
        restore_random_state(self._random_state)
        with torch.no_grad():
            for buffer, value in zip(self._network.buffers(), self._buffers, strict=True):
                buffer.copy_(value)
        self._optimizer.zero_grad(set_to_none=True)
        if self._scaler is not None:
            # It unscales once before each update, and may have done so. One that has scaled nothing cannot update.
            self._scaler.scale(next(self._network.parameters()).new_zeros(()))
            self._scaler.update(self._scaler.get_scale())


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


def _cause(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # what torch.compile's own errors wrap
    return f"{type(error).__name__}: {error}".splitlines()[0]
