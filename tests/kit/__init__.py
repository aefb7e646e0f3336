"""StyleLoom's test kit: a second node pack with seeded small models and files, for tests and demos only."""


async def comfy_entrypoint():
    import gc

    import folder_paths
    from comfy_api.latest import ComfyExtension

    from . import files, nodes

    files.ensure_files(folder_paths.models_dir)
    # The host collects garbage through the whole process now and then while it loads models. What it has imported never
    # becomes garbage: without that a collection takes a hundredth of the time.
    gc.collect()
    gc.freeze()

    class KitExtension(ComfyExtension):
        async def get_node_list(self):
            return nodes.NODES

    return KitExtension()
