"""DICOM: headers, stacks of slices, volumes, projections, segmentations and structure sets."""
