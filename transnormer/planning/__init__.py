"""What a training run on many GPUs needs and how long it takes: `transnormer plan`, and what a
trainer refuses."""
