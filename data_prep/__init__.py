"""From hospital and challenge downloads to nnU-Net and MONAI data sets. Never imports torch."""
