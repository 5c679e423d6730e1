"""What the GPU itself can do, whatever runs on it: the measures that a kernel's time is held against.

Each probe takes the current CUDA device and a budget of wall time in seconds, and yields Records as it goes:
bandwidth.bandwidth, l2.l2_reuse, launch.launches, launch.grid_barriers and clocks.clocks. What the budget had
no time for is a line that says so. bandwidth.copy_rate is the yardstick that every run measures for itself.
"""
