"""Model families on megatron-core layers."""
