"""The published layouts that ``convert`` reads: one file each."""
