"""How generated images are judged: features of a frozen network, then FID, sFID, IS, P/R and KID.

networks           the table NETWORKS and `load_network`: uint8 images -> pool, spatial, logits
inception          the FID network, by torch-fidelity
fd_dinov2          the network of FD-DINOv2
statistics         mergeable (n, mean, scatter) of features
frechet            FID and sFID from statistics or from few features
inception_score    IS from logits, in file order
precision_recall   improved precision and recall, three arithmetics
kid                the kernel distance, unbiased at every number of samples
standard_errors    how far a score lies from itself on other samples
published          the field's numbers, beside a result
resize             TensorFlow 1's legacy bilinear resize, the one the FID network was fed by
adm_file           the `.npz` of the ADM evaluation suite, written and read block by block
adm_reference      its reference file, written

A new network is one file with a loader, and one line in networks.NETWORKS.
"""
