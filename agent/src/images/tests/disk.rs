//! What accounts may have of the disk.

use std::process::{Child, Command};

use super::*;

#[tokio::test]
async fn an_account_has_so_much_of_the_disk_and_so_many_names() {
    let host = Host::new(
        "[limits]\nimages_mib = 1000\n[account]\nimages = 3\nimages_mib = 3\n[accounts.large]\nimages_mib = 9",
    );
    let images = host.open();
    import(&images, "a/one", root(1, 2 * MIB)).await.unwrap();
    let too_large = import(&images, "a/two", root(2, 2 * MIB)).await.unwrap_err();
    let left = match &too_large {
        ImagesError::AccountFull { account, left } if account == "a" => *left,
        other => panic!("{other}"),
    };
    assert!((MIB / 2..MIB).contains(&left), "{left}");
    // Of what is there a second name costs nothing, and others are not kept from theirs.
    import(&images, "a/two", root(1, 2 * MIB)).await.unwrap();
    import(&images, "large/one", root(2, 4 * MIB)).await.unwrap();
    import(&images, "large/two", root(3, 4 * MIB)).await.unwrap();
    import(&images, "a/three", root(4, 10)).await.unwrap();
    let names = import(&images, "a/four", root(4, 10)).await.unwrap_err();
    assert!(matches!(names, ImagesError::Names { limit: 3, .. }), "{names}");
    // A name that is there may be given to another.
    import(&images, "a/three", root(5, 10)).await.unwrap();
    // What is deleted makes room, and only with its last name.
    images.delete(name("a/one")).await.unwrap();
    let still = import(&images, "a/one", root(2, 2 * MIB)).await.unwrap_err();
    assert!(matches!(still, ImagesError::AccountFull { .. }), "{still}");
    let used = images.0.accounts().used();
    images.delete(name("a/two")).await.unwrap();
    swept(&images, used - 2 * MIB).await;
    import(&images, "a/one", root(2, 2 * MIB)).await.unwrap();
}

/// A process that has an image open, as a machine's VMM has, until it is killed.
struct Holder(Child);

impl Holder {
    async fn of(images: &Images, of: &str) -> Self {
        let opened = images.open_root(name(of)).await.unwrap();
        let file = Arc::into_inner(opened.file).unwrap();
        Self(Command::new("sleep").arg("1000").stdin(file).spawn().unwrap())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test]
async fn what_is_deleted_counts_until_the_last_machine_that_runs_it_has_ended() {
    let host = Host::new("[limits]\nimages_mib = 1000\n[account]\nimages_mib = 5");
    let images = host.open();
    import(&images, "a/web", root(1, 2 * MIB)).await.unwrap();
    let machines = [Holder::of(&images, "a/web").await, Holder::of(&images, "a/web").await];
    images.delete(name("a/web")).await.unwrap();
    assert_eq!(listed(&images, None, None, 9).await, Vec::<String>::new());
    import(&images, "a/web", root(2, 2 * MIB)).await.unwrap();
    let third = Holder::of(&images, "a/web").await;
    images.delete(name("a/web")).await.unwrap();
    let used = images.0.accounts().used();
    assert!(used > 4 * MIB, "{used}");
    // By this agent, and by the next.
    for images in [&images, &host.open()] {
        let full = import(images, "a/web", root(3, 2 * MIB)).await.unwrap_err();
        assert!(matches!(full, ImagesError::AccountFull { .. }), "{full}");
        assert_eq!(images.0.accounts().used(), used);
    }
    // What it has is no more by another name.
    import(&images, "a/again", root(1, 2 * MIB)).await.unwrap();
    assert_eq!(images.0.accounts().used(), used);
    images.delete(name("a/again")).await.unwrap();
    let [first, second] = machines;
    drop(first);
    let full = import(&images, "a/web", root(3, 2 * MIB)).await.unwrap_err();
    assert!(matches!(full, ImagesError::AccountFull { .. }), "{full}");
    drop(second);
    swept(&images, used / 2).await;
    import(&images, "a/web", root(3, 2 * MIB)).await.unwrap();
    images.delete(name("a/web")).await.unwrap();
    drop(third);
    swept(&images, 0).await;
    assert_eq!(host.files(), Vec::<String>::new());
}

#[tokio::test]
async fn a_damaged_image_counts_and_keeps_no_other_from_anything() {
    let host = Host::new("[limits]\nimages_mib = 1000\n[account]\nimages_mib = 5");
    let images = host.open();
    for (number, of) in [(1, "a/one"), (2, "a/two")] {
        import(&images, of, root(number, 2 * MIB)).await.unwrap();
    }
    let folder = |id: Digest| {
        let folder = host.config.store.path.join(FOLDER).join("a/images");
        folder.join(id.to_string().replace(':', "-"))
    };
    let one = folder(images.get(name("a/one")).await.unwrap().id);
    std::fs::remove_file(one.join("config.json")).unwrap();
    for images in [&images, &host.open()] {
        let found = images.list(None, None, 9).await.unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|image| (image.name.image(), image.is_damaged))
            .collect();
        assert_eq!(found, [("one", true), ("two", false)]);
        assert!(!images.get(name("a/two")).await.unwrap().is_damaged);
        let error = images.open_root(name("a/one")).await.map(|_| ()).unwrap_err();
        assert!(
            matches!(&error, ImagesError::Damaged(found) if *found == name("a/one")),
            "{error}"
        );
        import(images, "a/small", root(3, 10)).await.unwrap();
        // Its files are still there.
        let full = import(images, "a/three", root(4, 2 * MIB)).await.unwrap_err();
        assert!(matches!(full, ImagesError::AccountFull { .. }), "{full}");
        images.delete(name("a/small")).await.unwrap();
    }
    std::fs::remove_file(one.join("root.erofs")).unwrap();
    let images = host.open();
    import(&images, "a/one", root(1, 2 * MIB)).await.unwrap();
    images.open_root(name("a/one")).await.unwrap();
    images.delete(name("a/two")).await.unwrap();
    assert_eq!(listed(&images, Some("a"), None, 9).await, ["a/one"]);
}

#[tokio::test]
async fn what_images_take_of_the_host_is_promised_once() {
    // Two may be taken in, each of which needs three times what it has.
    let host = Host::new("[limits]\nimages_mib = 12\n[account]\nimages_mib = 100");
    let images = host.open();
    let first = images.slot().unwrap().import(name("a/web"), None);
    let too_large = import(&images, "b/web", root(1, 3 * MIB)).await.unwrap_err();
    let ImagesError::HostFull { left } = too_large else {
        panic!("{too_large}")
    };
    assert!(left <= 2 * MIB, "{left}");
    import(&images, "b/web", root(1, MIB)).await.unwrap();
    drop(first);
    // No image takes more than what was left for it, so that all stay within what there is.
    for number in 0..20 {
        let taken = import(&images, &format!("b/n{number}"), root(number, MIB)).await;
        let used = images.0.accounts().used();
        assert!(used <= 12 * MIB, "{used}");
        if let Err(error) = taken {
            assert!(matches!(error, ImagesError::HostFull { .. }), "{error}");
            assert!(number > 3, "{number}");
            return;
        }
    }
    panic!("it never was full");
}
