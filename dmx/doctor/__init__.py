"""What this machine has and whether it works: `dmx doctor`.

`examine` puts the report together and imports nothing that may be broken; `trials` runs that in other
processes: `packages` imports, `gpu` asks torch and the driver, `operations` runs the kernels.
"""
