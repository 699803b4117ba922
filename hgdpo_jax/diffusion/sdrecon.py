"""SDRecon: photographs on the way from generated to real (the paper's section on the normal stage)."""

import numpy as np

from hgdpo_jax.diffusion.process import Process
from hgdpo_jax.diffusion.trajectory import Trajectory


def sdrecon(schedule: Process, solver: str, steps: int, strength: int) -> Trajectory:
    """A photograph's latent, noised to the timestep 100 · strength of 1000 (t1…t10) and denoised from there.

    It begins at the solver's timestep that is nearest to that, the lower one of two. t1 is almost the photograph, t10
    almost a fresh sample.

    Raises:
        UserError: see :class:`hgdpo_jax.diffusion.process.Process`.
    """
    rising = schedule.make_steps(solver, steps).t[::-1]
    nearest = int(np.argmin(np.abs(rising - schedule.level(100 * strength))))
    table = schedule.make_steps(solver, steps, last=nearest + 1)
    return Trajectory.of_table(schedule, table, signal=table.signal[0], noise=table.sigma[0])
