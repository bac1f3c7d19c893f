"""Settings for the whole test session."""

import jax

# Several devices, so that tests can shard over them. Everything else runs on the first one, as without this.
jax.config.update("jax_num_cpu_devices", 4)
