"""What a training run costs, from published figures alone: operations, GPU hours, days, and the rate they imply.

A token costs about six operations for each parameter it is multiplied by: two in the forward pass, four in the backward
pass, which makes a gradient for the input and one for the weight. With experts only the active parameters count. What
attention adds grows with the length of the context and is left out of the six; the chapter adds it by itself.

Plain Python. Book: ``chapters/performance/training.ipynb``. Source: Kaplan et al. 2020 (arXiv 2001.08361, section 2.1)
for the count.
"""

from dslib import check

HOUR = 3600.0


def training_flops(active_parameters: float, tokens: float) -> float:
    """Operations of a training run: 6 N D."""
    check.above(0, active_parameters=active_parameters, tokens=tokens)
    return 6 * active_parameters * tokens


def achieved_rate(flops: float, gpu_hours: float) -> float:
    """Operations per second that one GPU did on average, pauses included."""
    check.above(0, flops=flops, gpu_hours=gpu_hours)
    return flops / (gpu_hours * HOUR)


def gpu_hours(flops: float, rate: float) -> float:
    """GPU hours for so many operations at ``rate`` operations per second and GPU."""
    check.above(0, flops=flops, rate=rate)
    return flops / rate / HOUR


def days(gpu_hours: float, gpus: int) -> float:
    """Days on ``gpus`` GPUs at once."""
    check.above(0, gpu_hours=gpu_hours, gpus=gpus)
    return gpu_hours / gpus / 24
