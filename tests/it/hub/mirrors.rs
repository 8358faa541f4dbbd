//! Mirrors that pass on a part of what the hub says: what is missing is asked for otherwise, and what can't be known is said.

use super::*;
use crate::support::hub::Mirror;

/// The files of the model with all that can be found out.
fn measured(scene: &Scene) -> Vec<RemoteFile> {
    let hub = scene.hub();
    let files = hub.list(&scene.snapshot).unwrap().files;
    files
        .iter()
        .map(|file| hub.measure(&scene.snapshot, file).unwrap())
        .collect()
}

fn arrives(scene: &Scene) {
    for (name, bytes) in [
        (WEIGHTS, weights()),
        ("config.json", b"{\"a\": 1}\n".to_vec()),
    ] {
        assert!(std::fs::read(scene.fetch(name).unwrap()).unwrap() == bytes);
    }
}

#[test]
fn without_trees_the_description_serves() {
    let scene = plain();
    scene.server.mirror(Mirror {
        no_tree: true,
        ..Mirror::default()
    });
    let listing = scene.hub().list(&scene.snapshot).unwrap();
    assert!(
        listing
            .files
            .iter()
            .all(|file| file.size.is_some() && file.has_hash())
    );
    arrives(&scene);
    let asked = scene.server.requests();
    assert!(
        asked
            .iter()
            .any(|asked| asked.path.ends_with("?blobs=true"))
    );
    assert!(asked.iter().all(|asked| asked.method == "GET"));
}

#[test]
fn without_sizes_each_file_is_asked_for() {
    for (no_head, no_redirects) in [(false, false), (true, false), (false, true), (true, true)] {
        let scene = plain();
        scene.server.mirror(Mirror {
            no_tree: true,
            no_sizes: true,
            no_head,
            no_redirects,
            ..Mirror::default()
        });
        let listed = scene.hub().list(&scene.snapshot).unwrap().files;
        assert!(listed.iter().all(|file| file.size.is_none()));
        let files = measured(&scene);
        assert_eq!(files[0].size, Some(9), "the redirect's own length is none");
        assert_eq!(files[0].git_sha1, Some(git_sha1(b"{\"a\": 1}\n")));
        assert_eq!(files[1].size, Some(2_400_000));
        assert_eq!(files[1].sha256, Some(sha256(&weights())));
        arrives(&scene);
        // Nothing is kept that would stand for the hub's own list.
        assert!(!scene.folder().join(".listings").exists());
        // Wrong contents are seen all the same.
        std::fs::remove_dir_all(scene.folder()).unwrap();
        scene.server.fault("/resolve/", Fault::WrongBytes, ALWAYS);
        let error = scene.fetch_error(WEIGHTS);
        assert!(error.contains("twice with the wrong content"), "{error}");
        scene.assert_nothing_kept();
    }
}

#[test]
fn without_hashes_the_size_is_checked_and_the_rest_is_known() {
    for no_redirects in [false, true] {
        let scene = plain();
        scene.server.mirror(Mirror {
            no_tree: true,
            no_sizes: true,
            no_hashes: true,
            no_redirects,
            ..Mirror::default()
        });
        let files = measured(&scene);
        assert!(files.iter().all(|file| !file.has_hash()), "{files:?}");
        assert_eq!(files[1].size, Some(2_400_000));
        scene.server.fault(WEIGHTS, Fault::CutAfter(1_000_000), 1);
        arrives(&scene);
        // It is named by what arrived, and damage is seen from then on.
        let path = scene.fetch(WEIGHTS).unwrap();
        let target = std::fs::read_link(&path).unwrap();
        assert_eq!(target, Path::new("../../blobs").join(sha256(&weights())));
        let before = scene.bodies(WEIGHTS).len();
        scene.fetch(WEIGHTS).unwrap();
        assert_eq!(scene.bodies(WEIGHTS).len(), before);
        let mut bytes = weights();
        bytes[7] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        arrives(&scene);
        assert_eq!(scene.bodies(WEIGHTS).len(), before + 1);
        scene.server.fault(WEIGHTS, Fault::Longer(1), ALWAYS);
        std::fs::remove_dir_all(scene.folder()).unwrap();
        let error = scene.fetch_error(WEIGHTS);
        assert!(error.contains("announces"), "{error}");
    }
}

#[test]
fn a_file_of_unknown_length_is_refused() {
    let scene = plain();
    scene.server.mirror(Mirror {
        no_tree: true,
        no_sizes: true,
        no_redirects: true,
        no_lengths: true,
        ..Mirror::default()
    });
    let error = scene.fetch_error(WEIGHTS);
    assert!(error.contains("how long the file is"), "{error}");
    scene.assert_nothing_kept();
}

#[test]
fn files_of_no_bytes_arrive() {
    for no_tree in [false, true] {
        let scene = plain();
        let commit = scene
            .server
            .model(REPO, &[("empty.txt", b""), ("empty.bin", b"")]);
        scene.server.mirror(Mirror {
            no_tree,
            no_sizes: no_tree,
            no_head: no_tree,
            ..Mirror::default()
        });
        let hub = scene.hub();
        let snapshot = model_at(&commit);
        for file in hub.list(&snapshot).unwrap().files {
            let path = hub.fetch(&snapshot, &file, &mut |_| Ok(())).unwrap();
            assert_eq!(std::fs::read(path).unwrap(), b"");
        }
    }
}
