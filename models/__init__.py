"""Model families on megatron-core layers."""

import megatron_ktr  # noqa: F401  what it does on import (see there) must come before megatron-core
