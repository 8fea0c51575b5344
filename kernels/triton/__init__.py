"""Device kernels in Triton. They know no model: tensors, sizes and strides come in, tensors go out."""
