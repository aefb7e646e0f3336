"""StyleLoom's test kit: a second node pack with seeded small models and files, for tests and demos only."""


async def comfy_entrypoint():
    import folder_paths
    from comfy_api.latest import ComfyExtension

    from . import files, nodes

    files.ensure_files(folder_paths.models_dir)

    class KitExtension(ComfyExtension):
        async def get_node_list(self):
            return nodes.NODES

    return KitExtension()
