"""Errors a user can cause, each with the numbers and the way out.

KVOffloadError
├── ConfigError (also a ValueError)     an option that makes no sense
│   └── UnknownOptionError (a TypeError)  one that does not exist
├── ProfileError                        a hardware profile that is missing, corrupt or from another machine
├── InfeasiblePlanError                 no plan fits the device or host memory
├── HostMemoryError                     the host cannot hold the cache
└── UnsupportedModelError               a model or call this library refuses rather than get wrong
"""


class KVOffloadError(Exception):
    """Base of every error raised on purpose by kvoffload."""


class ConfigError(KVOffloadError, ValueError):
    """An option or argument is wrong; the message says which values are accepted."""


class UnknownOptionError(ConfigError, TypeError):
    """There is no option of that name; the message says the nearest one. A TypeError as of any unknown argument."""


class ProfileError(KVOffloadError):
    """A hardware profile cannot be used; the message names the file and the reason."""


class InfeasiblePlanError(KVOffloadError):
    """No plan satisfies the memory limits; the message says which limit and by how much."""


class HostMemoryError(KVOffloadError):
    """The cache does not fit in the host memory that may be used."""


class UnsupportedModelError(KVOffloadError):
    """The model or the call cannot be offloaded correctly."""
