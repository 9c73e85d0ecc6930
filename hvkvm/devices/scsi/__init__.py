"""SCSI logical units: CDBs and data in, data and sense out. Nothing of what carries them."""
