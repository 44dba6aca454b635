"""A supervised process to call: cells, the zygote that forks them, spares, armed programs."""
