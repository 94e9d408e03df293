"""What one training run is made of: inputs, random draws, the step, checkpoints."""
