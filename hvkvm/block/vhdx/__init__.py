"""VHDX, Hyper-V's disk format, after Microsoft's specification [MS-VHDX]."""
