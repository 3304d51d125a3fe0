"""The kernels of btok: condensation-masked packed attention and the cross-rank contrastive loss."""
