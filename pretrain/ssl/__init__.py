"""Self-supervised learning on the codec's backbone: methods, heatmaps that guide the crops, kNN evaluation."""
