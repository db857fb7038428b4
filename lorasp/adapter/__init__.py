"""What stands beside one frozen layer: its adapter, whole or (LoRA-SP) in part, and what of it trains."""
