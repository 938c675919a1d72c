"""Every optimisation beside its plain twin, measured in the same run. Ratios hold between machines, times do not."""
