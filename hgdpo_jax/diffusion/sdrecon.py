"""SDRecon: photographs on the way from generated to real (the paper's section on the normal stage)."""

import numpy as np

from hgdpo_jax.diffusion.schedule import NoiseSchedule
from hgdpo_jax.diffusion.solvers import make_steps
from hgdpo_jax.diffusion.trajectory import Trajectory


def sdrecon(schedule: NoiseSchedule, solver: str, steps: int, strength: int) -> Trajectory:
    """A photograph's latent, noised to the timestep 100 · strength of 1000 (t1…t10) and denoised from there.

    It begins at the solver's timestep that is nearest to that, the lower one of two. t1 is almost the photograph, t10
    almost a fresh sample.

    Raises:
        UserError: see :func:`hgdpo_jax.diffusion.solvers.make_steps`.
    """
    rising = make_steps(schedule, solver, steps).t[::-1]
    nearest = int(np.argmin(np.abs(rising - strength * schedule.num_train_timesteps / 10)))
    table = make_steps(schedule, solver, steps, last=nearest + 1)
    return Trajectory.of_table(schedule, table, signal=table.signal[0], noise=table.sigma[0])
