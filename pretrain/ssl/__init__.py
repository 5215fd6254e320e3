"""Self-supervised learning on the codec's backbone: methods, heatmaps that guide crops, kNN evaluation."""
