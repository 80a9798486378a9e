"""XLA's settings for tests, by the version that reads them: most of a test's time is compiling."""

from importlib import metadata

OLD = (
    metadata.version("jaxlib") < "0.11"
)  # later versions end a process that names a flag they dropped
FLAGS = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * OLD
