"""The network and its pretext task: MEGNet, noise, loss, heads, kernels, and the format that weights are kept in."""
